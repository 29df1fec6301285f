"""Blind comparison of clips by people: which clips, which pairs, votes and their ranking."""
