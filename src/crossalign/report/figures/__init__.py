"""Figures by subject: classifiers, texts, searches, measurements; how they are styled, and what several of them are made of."""
