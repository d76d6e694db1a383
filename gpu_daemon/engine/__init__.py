"""The engine: plan, run, apply. Ids in, ids out; no tensors here but behind a Runner."""
