"""One Typer command per stage of ``dvc.yaml``; each only wires library calls together."""
