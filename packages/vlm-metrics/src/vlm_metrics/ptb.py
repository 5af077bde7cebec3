"""Captions into words, as the Penn Treebank tokenizer of the COCO evaluation parts them.

The official evaluation runs Stanford's PTBTokenizer 3.4.1 in Java (pycocoevalcap, tokenizer/ptbtokenizer.py). These are
its rules as far as captions meet them, so that no Java is needed; beyond them (abbreviations that are not listed, rare
symbols) words, and with them the last digits of CIDEr-D, can differ.
"""

import re

# These keep their full stop, wherever they stand.
_ABBREVIATIONS = (
    "mr mrs ms messrs dr drs prof rev sen rep gen col lt sgt capt cpl maj gov st ste mt ave blvd rd hwy jr sr inc ltd "
    "co corp bros dept univ assn jan feb mar apr jun jul aug sept sep oct nov dec vs etc al ph.d"
)
_TOKEN = re.compile(
    rf"""
      (?:https?://|www\.)\S*[^\s.,;:!?)"']              # addresses
    | [\w.+-]+@[\w-]+(?:\.\w+)+
    | </?[a-z]+\s*/?>                                   # tags
    | can(?=not\b) | (?:gon|wan)(?=na\b) | got(?=ta\b) | (?:gim|lem)(?=me\b) | 't(?=is\b|was\b)
    | '\d\ds?\b                                         # '90s
    | (?<!\w)(?:[^\W\d_]\.)+[^\W\d_](?!\w)\.?           # u.s.a.
    | (?<!\w)(?:{"|".join(map(re.escape, _ABBREVIATIONS.split()))})\.(?!\w)
    | (?<!\w)nos?\.(?=\ ?\d)
    | (?<!\w)[^\W\d_]\.(?=\ \w|[^\w\s])             # initials
    | n't\b | '(?:s|m|d|re|ve|ll)\b                     # clitics, parted from their word
    | o'\w+ | 'n'(?=\w) | 'n\b | c'mon\b | ma'am\b | d'you\b | [dl]'(?=\w\w) | y'(?=all\b)
    | [^\W\d_]+?(?=n't\b)
    | [-+]?\d++(?:[/-]\d++)*+(?![.,:]\d)\w*(?:-\w+)*     # numbers, with the letters joined to them: 24x36, 2-3pm
    | [-+]?(?:\d+(?:[.,:/-]\d+)*|\.\d+)(?:\w*(?:-\w+)+)?  # but 10:30 pm and 3.5-inch
    | (?-i:[A-Z]+(?:&[A-Z]+)+)                          # AT&T
    | \#[a-z]\w* | @\w+ | \w+(?:[-/]\w+|\.(?=[^\W\d])\w+)*
    | \.\.+ | --+ | [!?]+ | \S
    """,
    re.VERBOSE | re.IGNORECASE,
)
_WRITTEN = str.maketrans(
    {
        "\N{LEFT SINGLE QUOTATION MARK}": "'",
        "\N{RIGHT SINGLE QUOTATION MARK}": "'",
        "\N{LEFT DOUBLE QUOTATION MARK}": '"',
        "\N{RIGHT DOUBLE QUOTATION MARK}": '"',
        "\N{EN DASH}": "-- ",
        "\N{EM DASH}": "-- ",
        "\N{HORIZONTAL ELLIPSIS}": "...",
        "\N{POUND SIGN}": "#",
        "\N{EURO SIGN}": "$",
        "\N{CENT SIGN}": " cents",
        "\N{VULGAR FRACTION ONE HALF}": "1/2",
        "\N{VULGAR FRACTION ONE QUARTER}": "1/4",
        "\N{VULGAR FRACTION THREE QUARTERS}": "3/4",
    }
)
# Lower case makes of -LRB- what the official list of marks to drop does not know, so brackets stay as words.
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_DROPPED = re.compile(r"""[?!,:;'"`]|-+|\.+""")


def tokenise_caption(text: str) -> list[str]:
    """Part a caption into lower-case words and drop the marks that the COCO evaluation drops.

    Clitics are words of their own ("do n't", "dog 's"), words joined by hyphens or slashes are one, numbers keep their
    inner marks, and abbreviations their full stops. Full stops, commas, colons, semicolons, question and exclamation
    marks, dashes and quotes are dropped. Brackets are words, "-lrb-" and "-rrb-", as they are officially.
    """
    words = (word.lower() for word in _TOKEN.findall(text.translate(_WRITTEN)))
    return [_BRACKETS.get(word, word) for word in words if not _DROPPED.fullmatch(word)]
