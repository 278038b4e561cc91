"""Processes that answer clients: their lock changes hands soon, and the collector does not look through their modules."""

from __future__ import annotations

import subprocess
import sys


def test_a_prepared_process_collects_only_what_is_made_later() -> None:
    code = """
import gc, sys, weakref
import tc_ray.serving.failover.proxy
class Node: pass
from tc_ray.serving.wire import SWITCH_S, prepare_process
prepare_process()
assert abs(sys.getswitchinterval() - SWITCH_S) < 1e-9
assert gc.get_freeze_count() > 10_000 and len(gc.get_objects()) < 2_000, (gc.get_freeze_count(), len(gc.get_objects()))
node = Node(); node.self = node
gone = weakref.ref(node)
del node
gc.collect()
assert gone() is None
"""
    subprocess.run([sys.executable, "-c", code], check=True)
