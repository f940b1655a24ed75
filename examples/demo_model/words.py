"""The words that the model knows, each one token with the blank before it, and its tokenizer."""

import json
from pathlib import Path

from kimi_demo.tokenizer import Vocabulary, vocabulary_of_words, write_fast_tokenizer

VOCABULARY_SIZE = 768


def _list(text: str) -> list[str]:
    return text.split()


FIRST_NAMES = _list("""
Ada Adam Agnes Alan Albert Alice Amir Amos Amy Ana Andrea Angus Anita Anna Anton Arno Arthur Astrid Aziz Barbara Basil
Beatrix Ben Bernard Berta Bianca Bjorn Boris Brenda Bruno Carl Carmen Cecil Celia Chen Clara Conrad Cora Cyrus Daisy
Daniel Daria David Deborah Diana Dieter Dora Edgar Edith Edwin Elena Elias Elsa Emil Emma Enzo Erik Esther Eva Fabian
Fatima Felix Fiona Flora Frank Frida Fritz Gemma Georg Gerda Gina Greta Gustav Hana Hannah Harold Hassan Hector Heidi
Helen Henry Hilda Hugo Ian Ida Igor Ines Ingrid Irene Iris Isaac Ivan Jack Jana Jasper Jean Joan Jonas Josef Judith
Julia Karim Karl Kate Kenji Kirsten Klaus Lara Laura Leila Leo Lena Lidia Linus Lisa Louis Lucia Luis Magda Malik Marco
Maria Martha Max Mia Milan Mina Mona Nadia Naomi Nils Nina Nora Olga Omar Oscar Otto Paul Petra Priya Quentin Rafael
Ramon Rita Robert Rosa Ruth Samir Sara Selma Simon Sofia Stefan Sven Tania Theo Tilda Tom Ulla Umberto Vera Viktor
Walter Wanda Yara Yusuf Zoe
""")

LAST_NAMES = _list("""
Abbott Adler Aguilar Ahmed Alder Andersen Archer Ashby Bach Bailey Baker Banerjee Barnes Bauer Beck Becker Bell Berg
Bishop Blake Bloom Bond Booth Bosch Brandt Brooks Brown Burke Byrne Carter Castro Chan Clark Cohen Cole Conti Cook
Cooper Costa Cruz Curtis Dahl Dalton Diaz Dietrich Dixon Drake Duarte Dumont Ebner Ellis Engel Evans Faber Falk Farrell
Fernandez Fischer Fleming Flores Forster Fox Franco Fuchs Gallo Garcia Gibson Gomez Graham Grant Gray Greco Gruber
Gupta Haas Hale Hansen Harper Hartmann Hayes Hoffmann Holm Howard Huber Hughes Ibsen Ito Jansen Jensen Jones Kaiser
Kaplan Keller Kelly Khan Klein Koch Kovacs Kraus Kumar Lang Larsen Lehmann Lind Lopez Ludwig Lund Maier Marino Marsh
Mason Mendez Meyer Miller Moore Mori Moreau Morgan Nakamura Neumann Newton Nielsen Novak Nunez Olsen Ortega Palmer Park
Patel Pereira Peters Pohl Porter Quinn Ramos Reed Reyes Richter Rivera Romano Rossi Roth Russo Salas Sanchez Santos
Sato Schmidt Schneider Schulz Shah Silva Singh Sommer Stein Stone Suzuki Svensson Tanaka Taylor Thomas Torres Turner
Vargas Vogel Wagner Walker Weber Weiss Winter Wolf Wood Wright Yamada Young Zimmer
""")

QUALITIES = _list("northern southern eastern western upper lower inner outer first second third last")
THINGS = _list("gate door tower bridge lamp window valve engine garden harbour cellar station")
CONDITIONS = _list("open closed dark bright cold warm quiet empty full clean wet dry")
TIMES = _list("noon night dawn dusk midnight sunrise sunset breakfast lunch dinner")

# What else conversations.py says, and a few words more, with the blank before them and without.
PLAIN = _list("""
What Tell Do Repeat The Here user assistant system me you know is are was the code codes of and unknown this line at in
a log
""")


def vocabulary() -> Vocabulary:
    """768 tokens: bytes, words, control tokens as in the real checkpoint."""
    inner = [*FIRST_NAMES, *LAST_NAMES, *QUALITIES, *THINGS, *CONDITIONS, *TIMES, *PLAIN]
    words = [*(f" {word}" for word in dict.fromkeys(inner)), *(word for word in PLAIN if len(word) > 1)]
    return vocabulary_of_words(words, VOCABULARY_SIZE)


def write_tokenizer(folder: Path) -> None:
    write_fast_tokenizer(vocabulary(), folder)
    (folder / "generation_config.json").write_text(json.dumps(generation_config(), indent=2) + "\n")


def generation_config() -> dict[str, object]:
    known = vocabulary()
    return {
        "bos_token_id": known.special_id("[BOS]"),
        "eos_token_id": [known.special_id("<|im_end|>"), known.special_id("[EOS]")],
        "pad_token_id": known.special_id("[PAD]"),
    }
