"""From records in memory to data files on the disk, in a thread of each Pilot worker.

May import: config, mistakelog's rows and table. Read first: `writer.py`. `RecordWriter.put` queues a record
(`queue.py`); the thread hands it to `open_file.py`, and `ParquetPart` in `table/data_file.py` brings it to the disk.
The Ledger commits the file.
"""
