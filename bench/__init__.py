"""Benches of stateful_kv: one harness, suites of cases, and the peers they are compared with."""
