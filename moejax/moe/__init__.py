"""The layer and its parts; `moejax/__init__.py` names what is public."""
