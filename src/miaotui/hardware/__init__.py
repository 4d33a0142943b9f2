"""The machine: what it is (detect), what it can do (ceilings), what disturbs it (sensors)."""
