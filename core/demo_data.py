"""Text that teaches something and that we may give away, made from a seed: conversations to fine-tune on, and prose.

`dialogues` is the built-in data set `demo-dialogues`: questions whose answers a few lines of code compute, so that
every answer is right, in conversations of very unequal length, as real data has them; that is what packing is for.
`prose` is plain English out of our own word lists and grammar; the demo model's tokenizer and its short pre-training
read it. The words are common ones on purpose: a BPE trained on them spends few tokens on English that it never saw.

The same seed gives the same text with every Python: of `random.Random`, only `random()` keeps its sequence from one
version to the next, so everything is drawn through it.
"""

import random
import re
from calendar import isleap, monthrange
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from typing import TypeVar

Item = TypeVar("Item")
Row = dict[str, list[dict[str, str]]]

DEMO_MODEL = "demo/tiny-llama"
DEMO_DATASET = "demo-dialogues"

NUM_DIALOGUES = 600
DIALOGUES_SEED = 20_240


class Draw:
    """Random choices that every Python version makes alike."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def chance(self, probability: float) -> bool:
        return self._random.random() < probability

    def number(self, low: int, high: int) -> int:
        """A whole number, both ends included."""
        return low + int(self._random.random() * (high - low + 1))

    def one_of(self, items: Sequence[Item]) -> Item:
        return items[self.number(0, len(items) - 1)]

    def several_of(self, items: Sequence[Item], count: int) -> list[Item]:
        """`count` different items, in a drawn order."""
        rest = list(items)
        return [rest.pop(self.number(0, len(rest) - 1)) for _ in range(count)]


# -- words ---------------------------------------------------------------------------------------------------------
def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


NOUNS = _words("""
account act action address advantage age agreement air amount animal answer apple arm army article artist attempt
author autumn baby back bag bank base basis battle beach bed bell benefit bird birth block blood board boat body bone
book border bottle bottom bowl box boy branch bread bridge brother building business butter cake call camera camp
captain car card care case cat cause center century chain chair chance change chapter character charge child choice
church circle citizen city claim class clock cloth cloud club coast coat code coffee college color column comment
committee community company computer concern condition connection content context contract control copy corner cost
cotton council country couple course court cover cow credit crew crop crowd culture cup customer damage dance danger
daughter deal death debt decision degree demand department desk detail development device difference dinner direction
director discovery discussion disease distance district division doctor document dog dollar door doubt dream dress
drink driver duty ear earth east economy edge education effect effort egg election electricity element end enemy
energy engine engineer entry environment error event evening evidence example exchange exercise existence experience
experiment expert explanation eye face fact factor factory failure family farm farmer father fear feature feeling
field figure file film finger fire fish flight floor flow flower food foot force forest form fortune frame freedom
friend front fruit function future game garden gas gate girl glass goal gold government grass ground group growth
guard guess guest guide gun habit hair half hall hand harbor hat head health heart heat height help hill history hole
holiday home hope horse hospital hotel hour house husband ice idea image impact importance increase industry influence
information insect instruction instrument interest island issue item job journey judge key kind king kitchen knee
knife knowledge labor lady lake lamp land language law lawyer layer leader leaf leg length lesson letter level library
license life light limit line link lip list loan location log loss love lunch machine magazine majority manager manner
map mark market marriage master match material matter meal meaning measure meat medicine meeting member memory message
metal method middle mile milk mind mine minister minute mirror mistake model moment money month moon morning mother
motion mountain mouth movement movie music name nation nature neck need neighbor network news newspaper night noise
north nose note notice number object ocean office officer oil operation opinion opportunity order organization origin
owner page pain paint paper parent park part party passage past path patient pattern payment peace pen people percent
performance period permission person phone photograph phrase picture piece place plan plane plant plate player point
police policy population position power practice presence present president pressure price prince principle print
prison problem process product production profit program progress project promise property proposal protection public
purpose quality quarter queen question race radio rain range rate reaction reader reason record region relation
relationship release religion remark report request research resource respect response rest result return reward rice
right ring rise risk river road rock role roof room root rope rule safety salt sample sand scale scene school science
scientist screen sea search season seat second section security seed sense sentence series server service session set
shade shadow shape share sheep ship shirt shoe shop shore shoulder side sign signal silence silver sister situation
size skill skin sky sleep smile smoke snow society soil soldier solution son song sort soul sound source south space
speaker species speech speed spirit spot spring square stage stairs standard star start state statement station step
stick stock stomach stone store storm story stranger stream street strength stress structure student study style
subject success sugar summer sun supply support surface surprise system table task tax teacher team tension term test
text theory thing thought thread threat ticket time title tool tooth top topic total touch town track trade tradition
traffic train treatment tree trial trip trouble truck trust truth type uncle union unit university use user valley
value variety version vessel victory view village violence visit visitor voice volume vote wall war watch water wave
way weather web website week weight west wheel wife will wind window wine winter wire wish witness woman wood word work
worker world writer year youth
""")

VERBS = _words("""
accept achieve act add admit+ affect agree allow announce answer appear apply argue arrange arrive ask attack avoid
base believe belong call care carry cause change charge check claim clean clear close collect compare complain
complete concern confirm connect consider consist contain continue control copy count cover create cross cry cut:cut:cut
damage dance decide declare define deliver demand depend describe design destroy develop discover discuss divide
drop+ earn enable encourage end enjoy ensure enter establish examine exist expect explain express extend face fail
fill finish fix follow force form gain gather handle happen help hope identify imagine improve include increase
indicate influence inform intend introduce invite involve join jump justify kill kick laugh last learn lift like limit
link list listen live load lock look love manage mark matter mean:meant:meant measure mention mind miss move name need
note notice obtain occur+ offer open operate order own pack paint pass pay:paid:paid perform permit+ pick plan+ plant
play point prefer+ prepare present press prevent produce promise protect prove provide publish pull push raise reach
realize receive recognize record reduce refer+ refuse regard relate release remain remember remove repeat replace
reply report represent request require rest result return reveal save search seem separate serve settle share shout
show:showed:shown sign smile sound start state stay stop+ store study succeed suffer suggest supply support suppose
surprise talk taste test thank touch train travel treat try turn use visit wait walk want warn wash watch wear:wore:worn
win:won:won wish wonder work worry
be:was:been become:became:become begin:began:begun break:broke:broken bring:brought:brought build:built:built
buy:bought:bought catch:caught:caught choose:chose:chosen come:came:come do:did:done draw:drew:drawn
drink:drank:drunk drive:drove:driven eat:ate:eaten fall:fell:fallen feel:felt:felt fight:fought:fought
find:found:found fly:flew:flown forget:forgot:forgotten get:got:got give:gave:given go:went:gone grow:grew:grown
have:had:had hear:heard:heard hold:held:held keep:kept:kept know:knew:known lead:led:led leave:left:left
lose:lost:lost make:made:made meet:met:met put:put:put read:read:read ride:rode:ridden run:ran:run say:said:said
see:saw:seen sell:sold:sold send:sent:sent set:set:set sing:sang:sung sit:sat:sat sleep:slept:slept
speak:spoke:spoken spend:spent:spent stand:stood:stood take:took:taken teach:taught:taught tell:told:told
think:thought:thought throw:threw:thrown understand:understood:understood wake:woke:woken write:wrote:written
""")

ADJECTIVES = _words("""
able active actual afraid ancient angry available average bad basic beautiful best better big bitter black blind blue
brief bright broad broken brown busy calm careful central certain cheap chief clean clear clever close cold comfortable
common complete complex correct critical current daily dangerous dark dead dear deep different difficult direct dirty
double dry due eager early easy economic effective empty entire equal essential exact excellent existing expensive
external fair false familiar famous fast final financial fine firm first flat foreign formal former free frequent fresh
friendly full general gentle glad global golden good gray great green happy hard healthy heavy hidden high honest hot
huge human ideal immediate important impossible independent individual industrial initial inner interesting internal
international key kind large last late leading legal light likely limited little living local lonely long loose loud
low lucky main major married medical mental middle military modern moral narrow national native natural near necessary
negative nervous new nice normal obvious odd official old only open opposite ordinary original other painful particular
past perfect personal physical plain pleasant poor popular positive possible powerful practical present previous
private probable professional proper proud public pure quick quiet rapid rare raw ready real reasonable recent red
regular relevant responsible rich right rough round royal sad safe scientific secret separate serious severe sharp
short sick significant silent similar simple single slight slow small smart smooth social soft solid sorry special
specific standard steady still strange strict strong sudden sufficient suitable sweet tall technical terrible thick
thin tight tiny tired total traditional true typical unable unusual upper useful usual various vast warm weak wealthy
western wet white whole wide wild willing wise wonderful wooden wrong yellow young
""")

ADVERBS = _words("""
again almost already also always apart around away barely carefully certainly clearly closely completely directly early
easily effectively entirely especially even eventually ever exactly finally forward frequently generally gently
gradually hardly here highly immediately indeed instead just largely later likely mainly mostly nearly never normally
obviously often once only originally otherwise particularly perfectly perhaps possibly probably properly quickly
quietly rarely rather really recently regularly relatively seriously simply slightly slowly sometimes soon still
strongly suddenly surely then there therefore together too twice usually very well widely yesterday
""")

PEOPLE = _words("""
Ada Ben Clara David Emma Felix Grace Henry Ida James Kate Leo Maria Noah Olga Peter Rosa Sam Tara Victor
""")

VERBAL_NOUNS = _words("""
action addition application attention combination communication competition condition connection consideration
construction contribution creation description destination direction education examination expectation explanation
foundation generation imagination information introduction invitation observation operation organization population
position preparation presentation production protection publication reaction reflection relation reputation selection
situation solution translation variation achievement agreement argument arrangement development employment
entertainment environment equipment government improvement investment management measurement movement payment
requirement statement treatment ability activity authority capacity community difficulty majority opportunity
possibility property quantity reality responsibility society university variety absence appearance difference
distance existence experience importance influence patience performance presence reference science silence awareness
business darkness happiness illness kindness weakness friendship leadership membership relationship
""")

IRREGULAR_PLURALS = {
    "child": "children", "foot": "feet", "half": "halves", "knife": "knives", "leaf": "leaves", "life": "lives",
    "man": "men", "person": "people", "tooth": "teeth", "wife": "wives", "woman": "women",
    "fish": "fish", "news": "news", "people": "people", "police": "police", "series": "series", "sheep": "sheep",
    "species": "species", "stairs": "stairs",
}  # fmt: skip
IRREGULAR_THIRD_PERSONS = {"be": "is", "have": "has"}


def plural(noun: str) -> str:
    return IRREGULAR_PLURALS.get(noun) or _with_s(noun)


def _with_s(word: str) -> str:
    """The ending that makes a noun plural and a verb third person."""
    if word.endswith(("s", "sh", "ch", "x", "z", "o")):
        return word + "es"
    if word.endswith("y") and word[-2] not in "aeiou":
        return word[:-1] + "ies"
    return word + "s"


@dataclass(frozen=True)
class Verb:
    base: str
    third_person: str
    past: str
    participle: str
    gerund: str


def _conjugate(entry: str) -> Verb:
    """`walk`, `stop+` (its last letter doubles) or `take:took:taken`."""
    base, *forms = entry.removesuffix("+").split(":")
    stem = base + base[-1] if entry.endswith("+") else base
    drops_e = base.endswith("e") and not base.endswith(("ee", "be"))
    if forms:
        past, participle = forms
        doubles = base in ("begin", "cut", "forget", "get", "put", "run", "set", "sit", "win")
        stem = base + base[-1] if doubles else base
    elif base.endswith("y") and base[-2] not in "aeiou":
        past = participle = base[:-1] + "ied"
    else:
        past = participle = base + "d" if base.endswith("e") else stem + "ed"
    gerund = (base[:-1] if drops_e else stem) + "ing"
    return Verb(base, IRREGULAR_THIRD_PERSONS.get(base) or _with_s(base), past, participle, gerund)


CONJUGATED = tuple(_conjugate(entry) for entry in VERBS)

# -- prose ---------------------------------------------------------------------------------------------------------
WORDS: dict[str, Sequence[str]] = {
    "noun": (*NOUNS, *VERBAL_NOUNS),
    "nouns": [plural(noun) for noun in (*NOUNS, *VERBAL_NOUNS)],
    "adjective": ADJECTIVES,
    "adverb": ADVERBS,
    "name": PEOPLE,
    "verb": [verb.base for verb in CONJUGATED],
    "verbs": [verb.third_person for verb in CONJUGATED],
    "past": [verb.past for verb in CONJUGATED],
    "participle": [verb.participle for verb in CONJUGATED],
    "gerund": [verb.gerund for verb in CONJUGATED],
}

# <rule> is drawn among its lines; <noun> and its like are drawn from WORDS.
GRAMMAR: dict[str, Sequence[str]] = {
    "sentence": (
        "<thing> <past> <thing> <where>.",
        "<thing> <past> <thing>, and <thing> <past> <adverb>.",
        "<one> was <adjective>, but it was not <adjective> enough for <thing>.",
        "<when>, <thing> <past> <thing>.",
        "<when>, <they> <past> <thing> <where>.",
        "<they> <would> <verb> <thing> if <they> <would> <verb> <thing>.",
        "<they> <would> <adverb> <verb> <thing>, because <one> is <adjective>.",
        "There is <one> <where>, which <verbs> <thing>.",
        "There are <many> <nouns> <where>, and most of them are <adjective>.",
        "There were no <nouns>; there was only <one>.",
        "It is <adjective> to <verb> <thing> before you <verb> <thing>.",
        "It was <name> who <past> <thing>, not <name>.",
        "<name> <past> that <one> had <participle> <thing>.",
        "<name> said: \"<they> <would> <verb> it <where>.\"",
        "\"<question>\" asked <name>. \"<short>\"",
        "<question>",
        "What <name> <past> was <adjective>; what <name> <past> was <adjective>.",
        "When <one> is <participle>, <one> <verbs> <where>.",
        "While <thing> <past>, <one> was being <participle> by <thing>.",
        "<gerund> <one> is more <adjective> than <gerund> <thing>.",
        "The more <adjective> <thing> is, the less <they> <verb> about it.",
        "If <one> does not <verb>, then <thing> will not <verb> either.",
        "Each of the <nouns> has its own <noun>, such as <thing> or <thing>.",
        "They have been <gerund> <thing> for more than <count> years.",
        "She had <participle> <thing> with her <nouns>, so he <past> his own.",
        "We know how <one> <verbs>, but we do not know why.",
        "I think that these <nouns> are too <adjective>, and those <nouns> are not.",
        "You can <verb> <thing> after <one> has <participle>.",
        "Some <nouns> <verb> <adverb>; others <verb> only <where>.",
        "Both <thing> and <thing> were made of <noun>, though neither was <adjective>.",
        "Neither the <noun> nor the <noun> could <verb> without <thing>.",
        "In other words, <one> is one of the most <adjective> <nouns> in the world.",
        "For example, <one> <verbs> <count> <nouns> every day.",
        "However, <thing> should be <participle> as <adverb> as possible.",
        "At first <one> seemed <adjective>, and at last it was <participle>.",
        "Let us <verb> <thing> here, since nobody else will <verb> it.",
        "Whatever <they> <verb>, it must be <participle> again next year.",
    ),
    "short": (
        "Yes, it is.", "No, not yet.", "Of course.", "I do not know.", "That is what they said.", "It was <adjective>.",
        "Perhaps <adverb>.", "Nothing at all.", "Look at <thing>!", "<adverb>, I think.", "Thank you very much.",
    ),
    "question": (
        "Why did <thing> <verb> <where>?",
        "Where is <one> that <name> <past>?",
        "How many <nouns> does it take to <verb> <thing>?",
        "Who <past> <thing>?",
        "Can <they> <verb> <thing> without <noun>?",
        "What would happen if <thing> <past>?",
        "Which of these <nouns> is the <adjective> one?",
        "Do you <verb> <nouns>, or are you <gerund> them?",
    ),
    "one": (
        "the <noun>", "the <adjective> <noun>", "a <adjective> <noun>", "this <noun>", "that <noun>", "his <noun>",
        "her <noun>", "their <noun>", "the <noun> of <thing>", "<name>", "<name>'s <noun>", "every <noun>",
        "everything <adjective>", "my <adjective> <noun>", "one of the <nouns>", "nobody", "our <participle> <noun>",
    ),
    "thing": (
        "the <noun>", "the <noun>", "the <adjective> <noun>", "a <noun>", "a <adjective> <noun>", "the <nouns>",
        "<adjective> <nouns>", "this <noun>", "that <noun>", "their <noun>", "his <noun>", "her <noun>",
        "my <noun>", "our <nouns>", "your <noun>", "the <noun> of the <noun>", "the <noun> of <thing>", "each <noun>",
        "another <noun>", "any <noun>", "every <adjective> <noun>", "<name>", "<name>'s <noun>",
        "something <adjective>", "the <noun> between <thing> and <thing>", "the <gerund> <noun>",
        "the <participle> <noun>", "all <nouns>",
    ),
    "they": ("they", "we", "you", "I", "the <nouns>", "people", "many <nouns>", "<name> and I"),
    "would": ("would", "could", "should", "might", "must", "may", "can", "will", "did not", "cannot", "had to"),
    "where": (
        "in the <noun>", "on the <noun>", "at the <noun>", "from the <noun>", "with <thing>", "under the <noun>",
        "over the <nouns>", "through the <adjective> <noun>", "into the <noun>", "near <thing>", "behind the <noun>",
        "across the <noun>", "against <thing>", "among the <nouns>", "between the <nouns>", "within <count> <nouns>",
        "without <thing>", "around the <noun>", "by the <noun>", "for <thing>", "about <thing>", "towards the <noun>",
        "during the <noun>", "until the <noun>", "along the <noun>", "beyond the <noun>", "up and down the <noun>",
    ),
    "when": (
        "After the <noun>", "Before the <noun>", "In the <noun>", "Today", "Now", "Later", "One day", "Last <noun>",
        "Soon after", "At that time", "Once again", "During the <noun>", "In <year>", "On the <adjective> day",
        "For a long time", "As soon as <thing> <past>", "Every <noun>", "Since <year>", "At the end of the <noun>",
    ),
    "many": ("many", "few", "several", "<count>", "a great many", "only two", "so many", "a lot of"),
    "count": (
        "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "twelve", "twenty", "fifty",
        "a hundred", "a thousand", "a million",
    ),
    "year": ("1850", "1912", "1945", "1968", "1984", "1999", "2001", "2010", "2019", "2023"),
}  # fmt: skip
SLOT = re.compile(r"<(\w+)>")
A_BEFORE_VOWEL = re.compile(r"\ba (?=[aeio]|u(?!s[eu]|ni)|hon|hour)", re.IGNORECASE)


def prose(seed: int) -> Iterator[str]:
    """Paragraphs of plain English, without end."""
    draw = Draw(seed)
    while True:
        yield " ".join(_sentence(draw) for _ in range(draw.number(1, 9)))


def _sentence(draw: Draw) -> str:
    text = _expand(draw, "sentence", depth=0)
    text = A_BEFORE_VOWEL.sub("an ", text)
    start = 1 if text.startswith('"') else 0
    return text[:start] + text[start].upper() + text[start + 1 :]


def _expand(draw: Draw, rule: str, depth: int) -> str:
    if rule in WORDS:
        return draw.one_of(WORDS[rule])
    # Deep inside, things within things must end: the first eight lines of `thing` and `one` hold words alone.
    line = draw.one_of(GRAMMAR[rule][:8] if depth > 3 else GRAMMAR[rule])
    return SLOT.sub(lambda slot: _expand(draw, slot[1], depth + 1), line)


# -- questions whose answers are computed --------------------------------------------------------------------------
MONTHS = _words("January February March April May June July August September October November December")
WEEKDAYS = _words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
ALPHABET = "abcdefghijklmnopqrstuvwxyz"
SMALL_NUMBERS = _words(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
)
TENS = ("", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
THINGS_TO_COUNT = _words("apples books bottles boxes cards coins cups eggs flowers keys lamps letters stones tickets")
SPELLABLE = [noun for noun in NOUNS if 3 <= len(noun) <= 11]


@dataclass(frozen=True)
class Exchange:
    """A question and its answer; `number` is what a next question may call "that"."""

    question: str
    answer: str
    number: int | None = None


Topic = Callable[[Draw], Exchange]


def number_in_words(number: int) -> str:
    """0 to 999, as English writes it."""
    assert 0 <= number < 1000
    if number < 20:
        return SMALL_NUMBERS[number]
    if number < 100:
        return TENS[number // 10] + (f"-{SMALL_NUMBERS[number % 10]}" if number % 10 else "")
    rest = f" and {number_in_words(number % 100)}" if number % 100 else ""
    return f"{SMALL_NUMBERS[number // 100]} hundred{rest}"


def roman(number: int) -> str:
    numerals = ((100, "C"), (90, "XC"), (50, "L"), (40, "XL"), (10, "X"), (9, "IX"), (5, "V"), (4, "IV"), (1, "I"))
    text = ""
    for value, numeral in numerals:
        while number >= value:
            text += numeral
            number -= value
    return text


def _listed(items: Sequence[str]) -> str:
    return f"{', '.join(items[:-1])} and {items[-1]}" if len(items) > 1 else items[0]


def _written(day: date) -> str:
    return f"{day.day} {MONTHS[day.month - 1]} {day.year}"


def _weekday(day: date) -> str:
    return WEEKDAYS[day.weekday()]


def _day(draw: Draw) -> date:
    return date(1950, 1, 1) + timedelta(days=draw.number(0, 36_000))


def _addition(draw: Draw) -> Exchange:
    first, second = draw.number(2, 99), draw.number(2, 99)
    question = draw.one_of(
        (
            "What is {0} plus {1}?",
            "Add {0} and {1}.",
            "How much is {0} + {1}?",
            "What do you get if you add {1} to {0}?",
        )
    )
    return Exchange(question.format(first, second), f"{first} plus {second} is {first + second}.", first + second)


def _subtraction(draw: Draw) -> Exchange:
    second, rest = draw.number(1, 60), draw.number(1, 60)
    first = second + rest
    question = draw.one_of(("What is {0} minus {1}?", "Take {1} away from {0}.", "How much is {0} - {1}?"))
    return Exchange(question.format(first, second), f"{first} minus {second} is {rest}.", rest)


def _multiplication(draw: Draw) -> Exchange:
    first, second = draw.number(2, 12), draw.number(2, 12)
    question = draw.one_of(("What is {0} times {1}?", "Multiply {0} by {1}.", "How much is {0} x {1}?"))
    return Exchange(question.format(first, second), f"{first} times {second} is {first * second}.", first * second)


def _division(draw: Draw) -> Exchange:
    divisor, quotient = draw.number(2, 9), draw.number(2, 12)
    remainder = draw.number(0, divisor - 1)
    number = divisor * quotient + remainder
    question = draw.one_of(("Divide {0} by {1}.", "How often does {1} go into {0}?", "What is {0} divided by {1}?"))
    tail = f", and {remainder} is left over." if remainder else "."
    return Exchange(question.format(number, divisor), f"{number} divided by {divisor} is {quotient}{tail}", quotient)


def _word_problem(draw: Draw) -> Exchange:
    person, thing = draw.one_of(PEOPLE), draw.one_of(THINGS_TO_COUNT)
    start, bought = draw.number(3, 30), draw.number(2, 20)
    lost = draw.number(1, start)
    end = start + bought - lost
    question = (
        f"{person} has {start} {thing}, buys {bought} more and loses {lost} of them. "
        f"How many {thing} does {person} have now?"
    )
    answer = (
        f"{person} begins with {start} {thing}. After buying {bought} there are {start + bought}. "
        f"After losing {lost} there are {end}. So {person} has {end} {thing} now."
    )
    return Exchange(question, answer, end)


def _long_addition(draw: Draw) -> Exchange:
    first, second = draw.number(100, 9999), draw.number(100, 9999)
    question = draw.one_of(
        ("Add {0} and {1} and show each step.", "Show me step by step how to add {0} and {1}.")
    ).format(first, second)
    lines = [f"To add {first} and {second}, begin at the right and go to the left."]
    carry = 0
    for place, name in enumerate(("ones", "tens", "hundreds", "thousands")):
        above, below = first // 10**place % 10, second // 10**place % 10
        total = above + below + carry
        carried = f" plus the {carry} that was carried" if carry else ""
        carry = total // 10
        tail = ", carry 1" if carry else ""
        lines.append(f"{place + 1}. The {name}: {above} plus {below}{carried} is {total}. Write {total % 10}{tail}.")
    lines.append(f"The sum of {first} and {second} is {first + second}.")
    return Exchange(question, "\n".join(lines), first + second)


def _weekday_of(draw: Draw) -> Exchange:
    day = _day(draw)
    question = draw.one_of(
        ("Which day of the week is {0}?", "What weekday was {0}?", "On which day of the week does {0} fall?")
    )
    return Exchange(question.format(_written(day)), f"{_written(day)} is a {_weekday(day)}.")


def _days_later(draw: Draw) -> Exchange:
    day, days = _day(draw), draw.number(2, 60)
    question = draw.one_of(("Which date is {1} days after {0}?", "It is {0}. What is the date in {1} days?"))
    later = day + timedelta(days=days)
    return Exchange(question.format(_written(day), days), f"{days} days after {_written(day)} it is {_written(later)}.")


def _days_between(draw: Draw) -> Exchange:
    day, days = _day(draw), draw.number(2, 90)
    later = day + timedelta(days=days)
    question = f"How many days are there from {_written(day)} to {_written(later)}?"
    return Exchange(question, f"From {_written(day)} to {_written(later)} there are {days} days.", days)


def _leap_year(draw: Draw) -> Exchange:
    year = draw.number(1880, 2080)
    if isleap(year):
        return Exchange(f"Is {year} a leap year?", f"Yes, {year} is a leap year. It has 366 days.", 366)
    return Exchange(f"Is {year} a leap year?", f"No, {year} is not a leap year. It has 365 days.", 365)


def _month_length(draw: Draw) -> Exchange:
    month, year = draw.number(1, 12), draw.number(1990, 2030)
    days = monthrange(year, month)[1]
    question = draw.one_of(("How many days does {0} {1} have?", "How long is {0} {1}?"))
    return Exchange(question.format(MONTHS[month - 1], year), f"{MONTHS[month - 1]} {year} has {days} days.", days)


def _calendar(draw: Draw) -> Exchange:
    month, year = draw.number(1, 12), draw.number(1990, 2030)
    days = [date(year, month, day) for day in range(1, monthrange(year, month)[1] + 1)]
    question = f"List the days of {MONTHS[month - 1]} {year} with their weekdays."
    return Exchange(question, "\n".join(f"{day.day} {MONTHS[month - 1]}: {_weekday(day)}" for day in days))


def _clock(draw: Draw) -> Exchange:
    hour, minute, minutes = draw.number(0, 23), 5 * draw.number(0, 11), 5 * draw.number(1, 40)
    end = (60 * hour + minute + minutes) % (24 * 60)
    start_text, end_text = f"{hour:02}:{minute:02}", f"{end // 60:02}:{end % 60:02}"
    question = draw.one_of(("What time is it {1} minutes after {0}?", "It is {0}. What time is it in {1} minutes?"))
    return Exchange(question.format(start_text, minutes), f"{minutes} minutes after {start_text} it is {end_text}.")


UNITS = (
    ("kilometres", "metres", 1000),
    ("metres", "centimetres", 100),
    ("centimetres", "millimetres", 10),
    ("kilograms", "grams", 1000),
    ("tonnes", "kilograms", 1000),
    ("litres", "millilitres", 1000),
    ("hours", "minutes", 60),
    ("minutes", "seconds", 60),
    ("days", "hours", 24),
    ("weeks", "days", 7),
    ("years", "months", 12),
    ("feet", "inches", 12),
    ("yards", "feet", 3),
    ("dozens", "pieces", 12),
)


def _units(draw: Draw) -> Exchange:
    large, small, factor = draw.one_of(UNITS)
    count = draw.number(2, 40)
    if draw.chance(0.5):
        question = draw.one_of(("How many {2} are {0} {1}?", "Convert {0} {1} to {2}.", "What are {0} {1} in {2}?"))
        text = question.format(count, large, small)
        return Exchange(text, f"{count} {large} are {count * factor} {small}.", count * factor)
    question = draw.one_of(("How many {2} are {0} {1}?", "Convert {0} {1} to {2}."))
    return Exchange(
        question.format(count * factor, small, large), f"{count * factor} {small} are {count} {large}.", count
    )


def _temperature(draw: Draw) -> Exchange:
    celsius = 5 * draw.number(-6, 20)
    fahrenheit = celsius * 9 // 5 + 32
    question = f"What is {celsius} degrees Celsius in Fahrenheit?"
    return Exchange(question, f"{celsius} degrees Celsius are {fahrenheit} degrees Fahrenheit.", fahrenheit)


def _spell(draw: Draw) -> Exchange:
    word = draw.one_of(SPELLABLE)
    question = draw.one_of(("Spell the word {0}.", "How do you spell {0}?", "Write {0} letter by letter."))
    return Exchange(question.format(word), f"{word} is spelled {'-'.join(word)}.", len(word))


def _reverse(draw: Draw) -> Exchange:
    word = draw.one_of(SPELLABLE)
    question = draw.one_of(("Write {0} backwards.", "Spell {0} from the end to the beginning."))
    return Exchange(question.format(word), f"{word} backwards is {'-'.join(reversed(word))}.", len(word))


def _letters(draw: Draw) -> Exchange:
    word = draw.one_of(SPELLABLE)
    vowels = sum(letter in "aeiou" for letter in word)
    if draw.chance(0.5):
        return Exchange(f"How many letters does {word} have?", f"The word {word} has {len(word)} letters.", len(word))
    plural_ending = "" if vowels == 1 else "s"
    return Exchange(f"How many vowels are in {word}?", f"The word {word} has {vowels} vowel{plural_ending}.", vowels)


def _alphabet_position(draw: Draw) -> Exchange:
    position = draw.number(1, 26)
    letter = ALPHABET[position - 1]
    if draw.chance(0.5):
        return Exchange(
            f"Which letter of the alphabet is number {position}?", f"Letter {position} is {letter}.", position
        )
    return Exchange(
        f"Where in the alphabet is the letter {letter}?", f"The letter {letter} is number {position}.", position
    )


def _count_up(draw: Draw) -> Exchange:
    start, step, count = draw.number(0, 30), draw.one_of((1, 1, 2, 3, 5, 10)), draw.number(4, 30)
    numbers = [start + step * index for index in range(count)]
    steps = f" in steps of {step}" if step > 1 else ""
    question = draw.one_of(("Count from {0} to {1}{2}.", "Please count up from {0} to {1}{2}."))
    return Exchange(question.format(numbers[0], numbers[-1], steps), f"{', '.join(map(str, numbers))}.", numbers[-1])


def _count_down(draw: Draw) -> Exchange:
    start = draw.number(5, 40)
    end = draw.number(max(0, start - 25), start - 3)
    question = draw.one_of(("Count down from {0} to {1}.", "Count backwards from {0} to {1}."))
    return Exchange(question.format(start, end), f"{', '.join(map(str, range(start, end - 1, -1)))}.", end)


def _sort_words(draw: Draw) -> Exchange:
    words = draw.several_of(SPELLABLE, draw.number(3, 12))
    question = draw.one_of(
        (
            "Put these words in alphabetical order: {0}.",
            "Sort these words from a to z: {0}.",
            "Order by the alphabet: {0}.",
        )
    )
    return Exchange(question.format(", ".join(words)), f"In alphabetical order: {', '.join(sorted(words))}.")


def _sort_numbers(draw: Draw) -> Exchange:
    numbers = draw.several_of(range(1, 200), draw.number(3, 14))
    question = draw.one_of(("Sort {0} from small to large.", "Put these numbers in order: {0}."))
    return Exchange(question.format(", ".join(map(str, numbers))), f"In order: {', '.join(map(str, sorted(numbers)))}.")


def _extreme(draw: Draw) -> Exchange:
    numbers = draw.several_of(range(1, 500), draw.number(3, 6))
    word, choose = draw.one_of((("largest", max), ("smallest", min)))
    chosen = choose(numbers)
    question = f"Which is the {word} of {_listed([str(number) for number in numbers])}?"
    return Exchange(question, f"The {word} of them is {chosen}.", chosen)


def _in_words(draw: Draw) -> Exchange:
    number = draw.number(0, 999)
    question = draw.one_of(("Write {0} in words.", "How do you say {0} in English?"))
    return Exchange(question.format(number), f"{number} is {number_in_words(number)}.", number)


def _roman(draw: Draw) -> Exchange:
    number = draw.number(1, 99)
    if draw.chance(0.5):
        return Exchange(f"Write {number} in Roman numerals.", f"{number} is {roman(number)}.", number)
    return Exchange(f"Which number is {roman(number)}?", f"{roman(number)} is {number}.", number)


def _even_or_odd(draw: Draw) -> Exchange:
    number = draw.number(1, 999)
    kind, rest = ("odd", "leaves 1") if number % 2 else ("even", "leaves nothing")
    return Exchange(f"Is {number} even or odd?", f"{number} is {kind}: divided by 2 it {rest} over.", number)


def _next_in_row(draw: Draw) -> Exchange:
    start, step = draw.number(1, 40), draw.number(2, 12)
    numbers = [start + step * index for index in range(5)]
    question = f"What comes next: {', '.join(map(str, numbers[:4]))}?"
    return Exchange(question, f"Each is {step} more than the one before, so {numbers[4]} comes next.", numbers[4])


def _month_order(draw: Draw) -> Exchange:
    index = draw.number(0, 11)
    month, after = MONTHS[index], MONTHS[(index + 1) % 12]
    if draw.chance(0.5):
        return Exchange(f"Which month comes after {month}?", f"{after} comes after {month}.")
    return Exchange(f"Which month of the year is {month}?", f"{month} is month {index + 1} of 12.", index + 1)


def _times_table(draw: Draw) -> Exchange:
    number, last = draw.number(2, 25), draw.number(10, 20)
    question = draw.one_of(("Write the times table of {0} up to {1}.", "Show me {0} times 1 to {0} times {1}."))
    lines = [f"{number} times {factor} is {number * factor}." for factor in range(1, last + 1)]
    return Exchange(question.format(number, last), "\n".join(lines), number * last)


def _spell_each(draw: Draw) -> Exchange:
    words = draw.several_of(SPELLABLE, draw.number(4, 12))
    question = f"Spell each of these words and count its letters: {', '.join(words)}."
    lines = [f"{word}: {'-'.join(word)}, {number_in_words(len(word))} letters" for word in words]
    return Exchange(question, "\n".join(lines), sum(map(len, words)))


SHORT_TOPICS: tuple[Topic, ...] = (
    _addition, _subtraction, _multiplication, _division, _word_problem, _weekday_of, _days_later, _days_between,
    _leap_year, _month_length, _clock, _units, _temperature, _spell, _reverse, _letters, _alphabet_position, _count_up,
    _count_down, _sort_words, _sort_numbers, _extreme, _in_words, _roman, _even_or_odd, _next_in_row, _month_order,
)  # fmt: skip
LONG_TOPICS: tuple[Topic, ...] = (_long_addition, _calendar, _times_table, _spell_each)

OPENINGS = (
    "", "", "", "", "Please help me. ", "I have a question. ", "Hello! ", "Could you tell me this? ", "Quickly: ",
)  # fmt: skip
NEXT_OPENINGS = ("", "", "Thanks. ", "And now: ", "Next one. ", "Good. ", "Another one: ")
SYSTEM_PROMPTS = (
    "You answer questions about numbers, dates, units and words.",
    "You are a careful assistant. Answer in whole sentences.",
    "You are a patient teacher. Every answer must be correct.",
)


# -- conversations -------------------------------------------------------------------------------------------------
def dialogues(seed: int = DIALOGUES_SEED, count: int = NUM_DIALOGUES) -> Iterator[Row]:
    """`count` rows in OpenAI's messages format, 1 to 12 question-and-answer turns each."""
    draw = Draw(seed)
    for _ in range(count):
        yield {"messages": list(_conversation(draw))}


def _conversation(draw: Draw) -> Iterator[dict[str, str]]:
    if draw.chance(0.3):
        yield {"role": "system", "content": draw.one_of(SYSTEM_PROMPTS)}
    is_long = draw.chance(0.05)
    num_turns = draw.number(6, 12) if is_long else _num_turns(draw)
    topic = draw.one_of(SHORT_TOPICS)
    number: int | None = None
    for turn in range(num_turns):
        if number is not None and draw.chance(0.25):
            exchange = _about_that(draw, number)
        else:
            # Now and then the same kind of question follows.
            if turn > 0 and not draw.chance(0.3):
                topic = draw.one_of(SHORT_TOPICS)
            exchange = draw.one_of(LONG_TOPICS)(draw) if draw.chance(0.5 if is_long else 0.06) else topic(draw)
        opening = draw.one_of(NEXT_OPENINGS if turn else OPENINGS)
        yield {"role": "user", "content": opening + exchange.question}
        yield {"role": "assistant", "content": exchange.answer}
        number = exchange.number


def _num_turns(draw: Draw) -> int:
    """1 for four of ten conversations, then ever rarer, 12 at most."""
    turns = 1
    while turns < 12 and draw.chance(0.6):
        turns += 1
    return turns


def _about_that(draw: Draw, number: int) -> Exchange:
    """A question that only the turn before makes clear."""
    operand = draw.number(2, 9)
    question, answer, result = draw.one_of(
        (
            (f"Add {operand} to that.", f"{number} plus {operand} is {number + operand}.", number + operand),
            (f"What is that times {operand}?", f"{number} times {operand} is {number * operand}.", number * operand),
            ("What is the number before that?", f"The number before {number} is {number - 1}.", number - 1),
        )
    )
    return Exchange(question, answer, result)
