"""Reading the Mistake Log as a person: statistics, coloured sequences, a report page, export. Needs no Ray and no run."""
