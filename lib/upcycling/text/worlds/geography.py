"""Guides, journeys, tables and quizzes about the towns of an invented country; sentences in data/geography.json."""

from .draw import Draw
from .grammar import Choices, siblings, write_lines
from .words import WORDS, article, plural, read_json, split

_DATA = read_json("geography.json")
_SOUNDS = _DATA["sounds"]
_TOWN_ENDINGS = _DATA["town_endings"]
_COLUMNS = [split(columns) for columns in _DATA["columns"]]
_SENTENCES = [form for group in _DATA["sentences"] for form in group]
_SAME_FACT = siblings(_DATA["sentences"])
_HEADERS = Choices([": " + ", ".join(columns) + "\n" for columns in _COLUMNS])
_OPENING_FORMS = Choices([""] * len(_DATA["openings"]))
_QUESTION_FORMS = Choices([""] * len(_DATA["questions"]))
_MORE_SENTENCES = Choices(["", ""], [4, 1])


class Geography:
    """A country with its towns, each with its facts and a next town on one round way; writes about them."""

    def __init__(self, draw: Draw, n_towns: int):
        n = n_towns
        months, dishes, adjectives, landmarks = (
            split(_DATA[name]) for name in ("months", "dishes", "landmark_adjectives", "landmarks")
        )

        def names(count, syllables, endings):
            return [draw.new_name(_SOUNDS, *syllables, endings).title() for _ in range(count)]

        def person():
            return f"{draw.one_of(first_names)} {draw.one_of(families)}"

        (self.country,) = names(1, (2, 2), "ia or land")
        towns = names(n, (1, 2), _DATA["town_endings"])
        provinces = names(max(3, min(24, n // 12)), (2, 2), "ia en is")
        rivers = names(max(4, min(96, n // 5)), (1, 2), "e a o -")
        families = names(max(4, min(120, n // 4)), (1, 2), "sen ski man ber o er")
        first_names = WORDS["girl"] + WORDS["boy"]
        products = [plural(noun) for noun in WORDS["thing"] + WORDS["food"]]
        circle = draw.shuffled(range(n))
        successor = {town: circle[(i + 1) % n] for i, town in enumerate(circle)}
        self.towns = [
            {
                "town": town,
                "province": draw.one_of(provinces),
                "river": draw.one_of(rivers),
                "product": draw.one_of(products),
                "next": towns[successor[index]],
                "next_index": successor[index],
                "distance": str(3 + draw.below(95)),
                "founder": person(),
                "year": str(1000 + draw.below(900)),
                "landmark": f"{draw.one_of(adjectives)} {draw.one_of(landmarks)}",
                "festival": f"{draw.one_of(WORDS['food'])} festival",
                "month": draw.one_of(months),
                "flag": article(f"{draw.one_of(WORDS['color'])} {draw.one_of(WORDS['animal'])}"),
                "dish": f"{draw.one_of(WORDS['food'])} {draw.one_of(dishes)}",
                "mayor": person(),
            }
            for index, town in enumerate(towns)
        ]
        weights = draw.mention_weights(n)

        def for_each_town(form):
            return Choices([form.format(**town) for town in self.towns], weights)

        self._titles = Choices([title.format(country=self.country) for title in _DATA["titles"]])
        self._names = for_each_town("{town}")
        self._openings = [for_each_town(form) for form in _DATA["openings"]]
        self._questions = [for_each_town(form) for form in _DATA["questions"]]
        self._rows = [for_each_town(" ; ".join(f"{{{column}}}" for column in columns)) for columns in _COLUMNS]
        self._sentences = {}

    def _sentences_of(self, index: int) -> Choices:
        """The sentences about one town; made when first needed."""
        if index not in self._sentences:
            self._sentences[index] = Choices([form.format(**self.towns[index]) for form in _SENTENCES])
        return self._sentences[index]

    def write(self, chooser) -> None:
        """A guide, a journey, a table or a quiz about towns of the country."""
        style = chooser.pick(self._titles) // 2
        (self._guide, self._journey, self._table, self._quiz)[style](chooser)

    def _town(self, chooser, index: int, told=()) -> None:
        """Write four to eight sentences about a town, none of them among `told`."""
        used = list(told)
        for n_told in range(1, 9):
            chooser.say(" ")
            used += _SAME_FACT[chooser.pick_new(self._sentences_of(index), used)]
            if n_told >= 4 and (n_told == 8 or chooser.pick(_MORE_SENTENCES) == 1):
                break

    def _guide(self, chooser) -> None:
        chooser.say(".")
        used = []
        for _ in range(3):
            chooser.say("\n")
            used.append(chooser.pick_new(self._openings[chooser.pick(_OPENING_FORMS)], used))
            self._town(chooser, used[-1])

    def _journey(self, chooser) -> None:
        chooser.say(". We start in ")
        index = chooser.pick(self._names)
        chooser.say(".")
        for _ in range(3):
            chooser.say("\n{town} lies in {province} on the river {river}.".format(**self.towns[index]))
            self._town(chooser, index, told=_SAME_FACT[0])
            index = self.towns[index]["next_index"]

    def _table(self, chooser) -> None:
        rows, used = self._rows[chooser.pick(_HEADERS)], []
        write_lines(chooser, 10, 16, lambda: used.append(chooser.pick_new(rows, used)))

    def _quiz(self, chooser) -> None:
        chooser.say("\n")
        write_lines(chooser, 10, 16, lambda: chooser.pick(self._questions[chooser.pick(_QUESTION_FORMS)]))
