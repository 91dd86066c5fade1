"""Sentences with known answers, for the tasks on which circuits were first found.

    ioi           indirect-object identification (Wang et al. 2022): who is given the thing?
    greater_than  a span of years ends after it began (Hanna et al. 2023)
    docstring     the next argument that a docstring must describe (Heimersheim and Janiak 2023)

Each list of names, nouns, arguments and templates is in two parts, train and test. A test sentence
of a task holds only such of the test part, which the embedded model never met in a training
sentence of that task. (A name may stand in a book.)
"""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Literal, get_args

Task = Literal["ioi", "greater_than", "docstring"]
Split = Literal["train", "test"]

TASKS: tuple[Task, ...] = get_args(Task)


@dataclass(frozen=True)
class TaskSentence:
    """One sentence: `text` opens with `prompt + answer`; `prompt + distractor` would be wrong."""

    task: Task
    text: str
    prompt: str
    answer: str
    """What comes next, with the leading space where there is one."""
    distractor: str
    labels: dict[str, str]
    """What the sentence was made of, for probing: the template's id, the names, the years."""


def stream(
    task: Task, seed: int, split: Split, words: Sequence[str] = ()
) -> Iterator[TaskSentence]:
    """Sentences without end and without repeats; the same ones in the same order for a seed.

    `words` stand in for the split's own names (ioi) or arguments (docstring).
    """
    rng = random.Random(f"{task} {split} {seed}")
    seen: set[str] = set()
    while True:
        sentence = _MAKERS[task](rng, split, words)
        if sentence.text not in seen:
            seen.add(sentence.text)
            yield sentence


def sentences(task: Task, n: int, seed: int, split: Split) -> list[TaskSentence]:
    """The first `n` sentences of the stream."""
    return list(islice(stream(task, seed, split), n))


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


NAMES: dict[Split, tuple[str, ...]] = {
    "train": _words(
        """
        Tom John Mary Henry Nicholas Arthur Ralph Polly Maggie Frank Richard Lucy Laura Martin
        Sophia Alice Amy Mabel Elizabeth Louis James Rebecca Judith Jim Amelia Jane Bob Eleanor
        Fred Rosamond Joseph Jasper William Paul Gabriel Hetty Raymond Harry Godfrey Catherine
        Silas Marian Ernest Eugene Shirley Maud Hester Phoebe Daisy Theodore Bridget Jack Felix
        Adrian Harold Ruth Lizzie Eva Joe Russell Sam Eliza Celia Henrietta Benjamin Ned Sarah
        Beatrice Maria Isaac Marie Francis Matthew Betty Anna Michael Jacob Gilbert Donald Basil
        Charlotte Billy Laurence Rosa Stella Adam Edgar Ben Janet Antonia Lawrence Kitty Duncan
        Harriet Molly Sally Brian Victor Edmund Gertrude Alexander Lionel Dinah Aaron Luke Linda
        Giles Hilda Miriam Albert Andrew Edith Joan Lisa Bernard Timothy Jonathan Vincent
        Victoria Lydia Stanley Noah Agatha Simon Emma Olivia Owen Vera Maurice Kevin Karen Eric
        Jennifer Nathan Jason Justin Barbara Dorothy Kenneth Anthony Douglas Patrick Julian Sara
        Carl Oscar Sylvia Max Irene Nora Zoe Ryan Gary Keith Michelle Angela Nicole Kathleen
        Christine Megan Natalie Jessica Katherine Leonard Rupert Dennis Gregory Jeremy Cynthia
        """
    ),
    "test": _words(
        """
        George Emily Isabel Fanny Robert Charles Rachel Kate Agnes Edward Caroline Peter Philip
        Dora Thomas Ellen Florence Alan Flora Roger Esther Nancy Stephen Helen Clara David Jenny
        Martha Susan Alfred Hannah Julia Margaret Walter Daniel Hugh Diana Oliver Louisa Samuel
        """
    ),
}

PLACES: tuple[str, ...] = _words(
    """
    store garden market station library school church river beach kitchen harbour castle theatre
    village bridge farm hospital museum bakery forest hotel tavern office park
    """
)

OBJECTS: tuple[str, ...] = _words(
    """
    book letter ring basket lamp ticket drink flower map watch coat knife painting key cake
    bottle picture hat newspaper candle blanket necklace coin box
    """
)

# A sentence is a scene and a gift; a scene is a frame round what the pair did. {a} and {b} are the
# two names in the order of their first mention, {s} is the giver. Only together do the parts give
# so many templates that a model does better to learn the rule than to learn them by heart. No
# sentence opens with a name: without a space before it, it would be another token than later on.
_FRAME_PARTS: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    # A clause that cannot stand alone, and what leads from it to the gift.
    (
        (
            "When ",
            "While ",
            "After ",
            "Before ",
            "Because ",
            "As ",
            "Since ",
            "As soon as ",
            "Although ",
            "Every time ",
            "The moment ",
            "Even though ",
            "Just as ",
            "By the time ",
            "Not long after ",
            "On the day when ",
            "Now that ",
            "If it is true that ",
            "It was late when ",
            "In the year when ",
            "On the Friday when ",
            "Mr. White was not at home when ",
            "In Paris, when ",
        ),
        (
            ",",
            ", it seems,",
            ", at last",
            " and all was quiet,",
            " in the rain,",
            ", as I remember,",
            ", one afternoon,",
            " for the first time,",
            " as usual,",
            ", so the story goes,",
            " with the others,",
        ),
    ),
    # A clause that can.
    (
        (
            "Then ",
            "Then, ",
            "Once more ",
            "Perhaps ",
            "Last week ",
            "At first ",
            "For an hour ",
            "Again ",
            "One day ",
            "Yesterday ",
            "It was cold. ",
            "I heard that ",
            "In the morning ",
            "Long ago ",
            "The weather was fine, so ",
            "Nobody knew why ",
            "She told me how ",
            "Early in the spring ",
            "There was a time when ",
            "The two of them, ",
            "In those days ",
            "Of course ",
            "My aunt saw that ",
            "As always, ",
            "Some years later ",
            "Everybody knows that ",
            "That summer ",
            "Without a word ",
            "The paper says that ",
            "Late in the evening ",
            "This time ",
            "He wrote that ",
            "In June ",
            "At Christmas ",
            "On Monday ",
            "The Prince said that ",
            "When Doctor Brown was in London, ",
            "According to the Captain, ",
        ),
        (
            ", and",
            ", so",
            ", but soon",
            ", until",
            ";",
            ". Later",
            ". Before night",
            ". In the evening",
            ". Once",
            ". It was late, and",
            ". Soon after,",
            ". Then",
            ", and at noon",
            ", for",
            " and then",
            ", yet",
            ", while",
            ", before",
            ". To the surprise of all,",
            ", when suddenly",
            ". There was nothing to do, so",
            ". As it grew dark,",
            ", which is why",
            ", and by and by",
            ". Nobody was looking;",
            ", and in the end",
            ". Without a word",
            ", though",
            " because",
            ", after which",
        ),
    ),
)

FRAMES: dict[Split, tuple[str, ...]] = {
    "train": tuple(
        f"{opening}{{pair}} {{deed}}{joint}"
        for openings, joints in _FRAME_PARTS
        for opening in openings
        for joint in joints
    ),
    "test": (
        "After the lunch, {pair} {deed}, and",
        "Once {pair} {deed},",
        "On Sunday {pair} {deed}, and there",
        "It is said that {pair} {deed}. Afterwards",
        "The next day {pair} {deed}. Then",
        "That night {pair} {deed}, where",
    ),
}

PAIRS: tuple[str, ...] = (
    "{a} and {b}",
    "both {a} and {b}",
    "{a} together with {b}",
    "old {a} and young {b}",
    "my friend {a} and her cousin {b}",
    "{a} and also {b}",
    "little {a} and {b}",
    "{a} and poor {b}",
)

DEEDS: dict[Split, tuple[str, ...]] = {
    "train": (
        "went to the {place}",
        "were at the {place}",
        "walked to the {place}",
        "came into the {place}",
        "left the {place}",
        "stayed at the {place}",
        "had a long argument at the {place}",
        "met at the {place}",
        "sat down in the {place}",
        "lived near the {place}",
        "looked around in the {place}",
        "found a {object} in the {place}",
        "talked about the {object} in the {place}",
        "waited near the {place}",
        "came back from the {place} with a {object}",
        "ran out of the {place}",
        "wanted to see the {place}",
        "played in the {place}",
        "were tired of the {place}",
        "had a {object} and no money",
        "rode past the {place}",
        "cleaned the {place}",
        "read a story about the {place}",
        "were alone",
        "arrived at the {place}",
        "passed the {place} on the way home",
        "hid a {object} behind the {place}",
        "could not find the {place}",
        "ate in the {place}",
        "danced in front of the {place}",
        "quarrelled over a {object}",
        "were looking for the {object}",
        "owned a {object}",
        "were married in the {place}",
        "painted the {place} red",
        "crossed the road to the {place}",
        "hurried home from the {place}",
        "had not seen the {place} for years",
        "laughed at the {object} in the {place}",
        "shared a {object}",
        "paid for the {place}",
        "were lost on the way to the {place}",
        "stood before the {place} in the rain",
        "kept the {place} open all night",
        "dreamed of a {object}",
        "carried a heavy {object} to the {place}",
        "said that the {place} was too far away",
        "heard a noise from the {place}",
        "broke the {object}",
        "were asked to leave the {place}",
        "built a {place} with their own hands",
        "were born near the {place}",
        "followed a dog into the {place}",
        "wrote about the {place} every day",
        "sang",
        "met again after many years",
        "swept the floor of the {place}",
        "never spoke of the {object}",
        "climbed the wall of the {place}",
        "looked at the {object} for a long time",
    ),
    "test": (
        "got a {object} at the {place}",
        "spent the day at the {place}",
        "were working at the {place}",
        "drove to the {place}",
        "slept in the {place}",
        "visited the {place}",
    ),
}

GIFTS: dict[Split, tuple[str, ...]] = {
    "train": (
        "{s} gave a {object} to",
        "{s} gave the {object} back to",
        "{s} wished to give the {object} to",
        "{s} handed a {object} to",
        "{s} said something to",
        "{s} spoke about the {object} to",
        "{s} sold a {object} to",
        "{s} passed the {object} to",
        "{s} showed a {object} to",
        "{s} lent the {object} to",
        "{s} wanted to bring a {object} to",
        "{s} offered the {object} to",
        "{s} bought a {object} for",
        "{s} carried the {object} for",
        "{s} threw a {object} to",
        "{s} whispered a word to",
        "{s} wrote a letter about the {object} to",
        "{s} pointed the {object} out to",
        "{s} found a {object} and gave it to",
        "{s} took the {object} and read it to",
        "a {object} was given by {s} to",
        "{s} promised a {object} to",
        "{s} told the story of the {object} to",
        "{s} left the {object} with",
        "{s} owed a {object} to",
        "{s} explained everything to",
        "{s} bowed to",
        "{s} smiled and said good night to",
        "{s} ran after",
        "{s} was thinking of",
        "{s} fetched the {object} for",
        "{s} made a {object} for",
        "{s} opened the {object} in front of",
        "{s} asked for the {object} and took it from",
        "{s} sat down next to",
        "{s} had the {object} repaired for",
        "{s} complained about the {object} to",
        "{s} laid the {object} before",
        "{s} turned round and waved to",
        "{s} stole the {object} from",
        "{s} played a song for",
        "{s} sang to",
        "{s} described the {object} to",
        "{s} held out a {object} to",
        "{s} dropped the {object} and ran to",
        "{s} could not lie to",
        "{s} let the {object} fall at the feet of",
        "{s} slowly walked over to",
        "the {object} which {s} had chosen was for",
        "{s} put the {object} into the hands of",
        "{s} secretly sold the {object} of",
        "a word from {s} was enough for",
        "{s} was angry with",
        "{s} borrowed a {object} from",
        "{s} would not part with the {object}, not even for",
        "{s} came with a {object} for",
        "{s} forgot the {object} and hurried back to",
        "{s} read the whole {object} aloud to",
        "{s} shut the door and turned to",
        "{s} put a {object} on the table for",
    ),
    "test": (
        "{s} decided to give a {object} to",
        "{s} kindly gave the {object} to",
        "{s} brought a {object} to",
        "{s} sent the {object} to",
        "{s} bought a {object} and handed it to",
        "{s} returned the {object} to",
    ),
}


def _ioi(rng: random.Random, split: Split, words: Sequence[str]) -> TaskSentence:
    io, subject = rng.sample(words or NAMES[split], 2)
    order = rng.choice(("ABB", "BAB"))
    a, b = (io, subject) if order == "ABB" else (subject, io)
    place, thing = rng.choice(PLACES), rng.choice(OBJECTS)
    frame, deed, gift = (rng.randrange(len(p[split])) for p in (FRAMES, DEEDS, GIFTS))
    scene = FRAMES[split][frame].format(
        pair=rng.choice(PAIRS).format(a=a, b=b),
        deed=DEEDS[split][deed].format(place=place, object=thing),
    )
    closing = GIFTS[split][gift].format(s=subject, object=thing)
    prompt = f"{_capitalized(scene)} {_capitalized(closing) if scene.endswith('.') else closing}"
    return TaskSentence(
        task="ioi",
        text=f"{prompt} {io}.",
        prompt=prompt,
        answer=f" {io}",
        distractor=f" {subject}",
        labels={
            "template": f"ioi.{split}.{frame}.{deed}.{gift}",
            "order": order,
            "io": io,
            "subject": subject,
            "place": place,
            "object": thing,
        },
    )


def _capitalized(text: str) -> str:
    return text[0].upper() + text[1:]


RECALL_TEMPLATES: tuple[str, ...] = (
    "{a} has the {x} and {b} has the {y}. The owner of the {y} is {b}, of the {x} it is {a}.",
    "The {x} belongs to {a}. The {y} belongs to {b}. So the {y} must be brought to {b}.",
    "{a} is in the {place}, and {b} is not. If you go to the {place}, you will find {a}.",
    "Those present were {a}, {b} and {c}. Those who spoke were {a}, {b} and {c}.",
    "Ask {a} about the {x} and {b} about the {y}. Who knows of the {x}? It is {a}.",
    "{c} knows {a}, {a} knows {b}. Who is known to {c}? The answer is {a}.",
)


def recall_sentences(n: int, seed: int) -> list[str]:
    """Sentences that name somebody again, with train names.

    They teach a model to copy a name that it has just read, which no name is born with, and are not
    of the task: who is named again follows from a thing or a place, never from who was named twice.
    """
    rng = random.Random(f"recall {seed}")
    texts = []
    for _ in range(n):
        a, b, c = rng.sample(NAMES["train"], 3)
        x, y = rng.sample(OBJECTS, 2)
        template = rng.choice(RECALL_TEMPLATES)
        texts.append(template.format(a=a, b=b, c=c, x=x, y=y, place=rng.choice(PLACES)))
    return texts


NOUNS: dict[Split, tuple[str, ...]] = {
    "train": _words(
        """
        war famine reign plague trial journey voyage search rebellion strike building feud
        expedition truce drought treaty conflict harvest project survey marriage quarrel
        friendship lease occupation crusade inquiry tour contest partnership exile frost boom
        panic revival
        """
    ),
    "test": _words(
        """
        siege campaign dispute alliance blockade construction crisis dynasty
        """
    ),
}

YEAR_TEMPLATES: dict[Split, tuple[str, ...]] = {
    "train": (
        "The {noun} lasted from the year {start} to the year {century}",
        "The {noun} began in {start} and ended in {century}",
        "The {noun} started in the year {start} and was over in the year {century}",
        "The {noun} went on from {start} until {century}",
        "The records of the {noun} cover the years from {start} to {century}",
        "People spoke of the {noun} between {start} and {century}",
        "They planned the {noun} in {start}, and it came to nothing in {century}",
        "From {start} the {noun} was in every letter, till it was forgotten in {century}",
    ),
    "test": (
        "The {noun} dragged on from the year {start} until the year {century}",
        "The {noun} ran from {start} to {century}",
        "The {noun} opened in {start} and was settled in {century}",
    ),
}

CENTURIES: tuple[int, ...] = tuple(range(11, 19))


def is_test_year(year: int) -> bool:
    """Whether spans that start in the year belong to the test part: one start year in four does."""
    return year % 4 == 1


def _greater_than(rng: random.Random, split: Split, words: Sequence[str]) -> TaskSentence:
    """Both ends share the century, so the answer is two digits, each a token of its own."""
    century = rng.choice(CENTURIES)
    starts = [y for y in range(2, 98) if is_test_year(100 * century + y) == (split == "test")]
    start = rng.choice(starts)
    end, not_after = rng.randrange(start + 1, 100), rng.randrange(start + 1)
    noun = rng.choice(NOUNS[split])
    number, template = rng.choice(list(enumerate(YEAR_TEMPLATES[split])))
    prompt = template.format(noun=noun, start=f"{century}{start:02d}", century=century)
    return TaskSentence(
        task="greater_than",
        text=f"{prompt}{end:02d}.",
        prompt=prompt,
        answer=f"{end:02d}",
        distractor=f"{not_after:02d}",
        labels={
            "template": f"greater_than.{split}.{number}",
            "noun": noun,
            "century": str(century),
            "start": f"{start:02d}",
            "end": f"{end:02d}",
        },
    )


ARGUMENTS: dict[Split, tuple[str, ...]] = {
    "train": _words(
        """
        name path data value key file size index text width height color user message result
        node item date count source target method model version mode limit title label state
        level host port query table column token buffer offset start stop step shape axis dtype
        rate weight address command context default encoding errors filename format header image
        length logger
        """
    ),
    "test": _words(
        """
        input output url timeout parent config event request response options prefix suffix
        timestamp matrix vector kernel domain pattern password schema
        """
    ),
}

VERBS: dict[Split, tuple[str, ...]] = {
    "train": _words(
        """
        load save read write find make check update parse build merge open
        """
    ),
    "test": _words("send fetch render split convert apply"),
}

# What stands between the signature and the first parameter, and the mark before each parameter.
DOCSTRING_TEMPLATES: dict[Split, tuple[tuple[str, str], ...]] = {
    "train": (
        ('def {function}(self, {arguments}):\n    """{summary}\n\n', ":param"),
        ('def {function}({arguments}):\n    """{summary}.\n\n', ":param"),
        ('def {function}({arguments}):\n    """\n    {summary}\n\n', ":param"),
        ('def {function}(self, {arguments}):\n    """{summary}.\n\n', "@param"),
        ('async def {function}({arguments}):\n    """{summary}\n\n', "@param"),
        ('def {function}(self, {arguments}) -> None:\n    """{summary}\n\n', ":arg"),
        ('def {function}(*, {arguments}):\n    """{summary}\n\n', ":parameter"),
        ('def {function}(cls, {arguments}):\n    """\n    {summary}.\n\n', ":arg"),
    ),
    "test": (
        ('def {function}(self, {arguments}) -> bool:\n    """{summary}.\n\n', ":param"),
        ('async def {function}(self, {arguments}):\n    """\n    {summary}\n\n', ":param"),
        ('def {function}({arguments}) -> str:\n    """{summary}\n\n', "@param"),
    ),
}

ADJECTIVES: tuple[str, ...] = _words(
    """
    new old first last main local global raw current optional empty short
    """
)
THINGS: tuple[str, ...] = _words(
    """
    record page line field block group series object report script account window
    """
)


def _docstring(rng: random.Random, split: Split, words: Sequence[str]) -> TaskSentence:
    def phrase() -> str:
        return f"{rng.choice(ADJECTIVES)} {rng.choice(THINGS)}"

    arguments = rng.sample(words or ARGUMENTS[split], rng.randint(3, 6))
    # The first argument may stand right after "(", without the space that its answer would have.
    position = rng.randrange(1, len(arguments))
    answer = arguments[position]
    distractor = rng.choice([a for a in arguments if a != answer])
    verb = rng.choice(VERBS[split])
    function = f"{verb}_{rng.choice(THINGS)}"
    number, (head, mark) = rng.choice(list(enumerate(DOCSTRING_TEMPLATES[split])))
    opening = head.format(
        function=function,
        arguments=", ".join(arguments),
        summary=f"{verb.capitalize()} the {phrase()}",
    )
    described = "".join(f"    {mark} {a}: the {phrase()}\n" for a in arguments[:position])
    prompt = f"{opening}{described}    {mark}"
    return TaskSentence(
        task="docstring",
        text=f'{prompt} {answer}: the {phrase()}\n    """\n',
        prompt=prompt,
        answer=f" {answer}",
        distractor=f" {distractor}",
        labels={
            "template": f"docstring.{split}.{number}",
            "function": function,
            "arguments": " ".join(arguments),
            "argument": answer,
            "position": str(position),
        },
    )


_MAKERS: dict[Task, Callable[[random.Random, Split, Sequence[str]], TaskSentence]] = {
    "ioi": _ioi,
    "greater_than": _greater_than,
    "docstring": _docstring,
}
