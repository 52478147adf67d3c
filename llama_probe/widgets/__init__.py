"""Explorers for the notebook: views that follow a selection, with the live model behind a click."""
