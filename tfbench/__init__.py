__version__ = "0.1.0"


def __getattr__(name: str):
    "`tfbench.load_kept` at its first use: importing tfbench itself costs nothing."
    if name != "load_kept":
        raise AttributeError(f"module 'tfbench' has no attribute {name!r}")
    from tfbench.study.kept import load_kept

    return load_kept
