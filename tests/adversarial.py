"""Texts that look right and are not: for each grader, pairs of a text and a gold answer that it must not call right."""

from test_grading import NOT_SEVEN, TRAPS

# What `numeric` and `symbolic` may read as 7 although the stricter reader does not: degrees, other ways to announce.
_LOOSER = {"The answer is 7°.", "Answer: 7", "### 7", "The answer = 7"}
# Spellings of 7 in mathematics.
_SEVEN = {"n=7", "x = 7", "(7)", "{7}", "7°"}

# Pairs of a false answer and a gold one, none of which any way of saying it makes right.
UNEQUAL = [
    *[(str(value), str(gold)) for value, gold in [(3.5, 5), (3.5, 3), (3.5, 35), (5, 3.5), (7, -7), (-7, 7), (0, 7)]],
    *[(str(100 * value), str(value)) for value in (1, 2, 7, 18, 0.5, 12.25, -3)],
    *[(str(value), str(100 * value)) for value in (1, 2, 7, 18, 36, -3)],
    *[("1,234", "234"), ("1,234", "1"), ("1,234", "1.234"), ("234", "1,234"), ("12,345", "12345.6"), ("1.234", "1234")],
    *[("0.5", "50%"), ("50%", "0.5"), ("50%", "1/2"), ("5000%", "50"), ("0.07", "7%"), ("700%", "7"), ("7%", "0.07")],
    *[
        ("1/2", "2"),
        ("1/2", "1"),
        ("2/1", "1/2"),
        ("-1/2", "1/2"),
        ("1/3", "0.33"),
        ("0.333", "1/3"),
        ("0.3333", "1/3"),
    ],
    *[("12", "21"), ("10", "1"), ("1", "10"), ("1000000", "1000001"), ("0.1", "0.10000001"), ("99.99", "100")],
    *[
        ("3", "3k"),
        ("5 cm", "5 km"),
        ("$5", "5 cents"),
        ("5 hours", "5 minutes"),
        ("€5", "$5"),
        ("7 pears", "7 apples"),
    ],
]

SAID = ["The answer is {}.", "#### {}", "So we get \\boxed{{{}}}.", "The answer is $\\boxed{{{}}}$.", "Answer: {}"]

STRAY = [
    "We try 7, then 8, then 9.",
    "7 7 7 7 7 7 7",
    "1 2 3 4 5 6 7 8 9 10",
    "First 3 + 4 = 7, but that is not what is asked.",
    "She has 7 apples. How many are left?",
    "The answer is 8. Earlier I had 7.",
    "7 is what I would have said. The answer is 8.",
    "I got 7. The answer is 8.",
    "The answer is somewhere between 6 and 7.",
    "The answer is 8 (7 was the first guess).",
    "The answer is 7 if it rains.",
    "The answer is 7 unless she lost one.",
    "The answer is probably 7.",
    "The answer is maybe 7?",
    "The answer is 7 or so.",
    "The answer is either 7 or 8.",
    "The answer is neither 7 nor 8.",
    "The answer is 7, or 8 if you count Ben.",
    "The answer is 7. Actually, it is 8.",
    "The answer is 7. Wait, no. It is 8.",
    "The answer is 7.\nThe answer is 8.",
    "#### 7\nHmm, that is wrong.\n#### 8",
    "\\boxed{7} was wrong, so \\boxed{8}.",
    "\\boxed{7} or \\boxed{8}",
    "\\boxed{7}, \\boxed{8}",
    "$\\boxed{7}$ or $8$",
    "$\\boxed{7}$. No, $8$.",
    "$\\boxed{7}$. Wait, it should be 8.",
    "$\\boxed{7}$. Actually, it is 8.",
    "$\\boxed{7}$, sorry, 8",
    "\\boxed{7}. My answer is 8.",
    "\\boxed{7}. But 8 is right.",
    "8 or $\\boxed{7}$",
    "Not $\\boxed{7}$.",
    "It is not equal to $\\boxed{7}$.",
    "It cannot be \\boxed{7}.",
    "Maybe \\boxed{7}",
    "I doubt that it is \\boxed{7}.",
    "\\boxed{7",
    "\\boxed{7}}{8",
    "\\boxed{7}^2",
    "\\boxed{7}!",
    "\\boxed{7}{8}",
    "\\boxed{7}8",
    "\\boxed{7}k",
    "\\boxed{7} million",
    "\\boxed{7} quadrillion",
    "\\boxed{7}. Nope, 8",
    "\\boxed{7}. Hold on: 8",
    "\\boxed{7}\\text{ thousand}",
    "\\boxed{7} and \\boxed{8}",
    "\\boxed{7} to 9",
    "\\boxed{7} + 1",
    "\\boxed{7} - 1",
    "\\boxed{7} \\cdot 2",
    "\\boxed{7}\\sqrt{2}",
    "-\\boxed{7}",
    "2\\boxed{7}",
    "x^{\\boxed{7}}",
    "\\frac{\\boxed{7}}{2}",
    "\\sqrt{\\boxed{7}}",
    "5 + \\boxed{7}",
    "2 \\cdot \\boxed{7}",
    "\\boxed{\\text{not }7}",
    "\\boxed{7 \\text{ or } 8}",
    "\\boxed{7, 8}",
    "\\boxed{\\{7, 8\\}}",
    "\\boxed{7 \\pm 1}",
    "\\boxed{\\pm 7}",
    "\\boxed{x > 7}",
    "\\boxed{\\approx 7}",
    "\\boxed{7x}",
    "\\boxed{7 \\text{ thousand}}",
    "\\boxed{7000}",
    "\\boxed{\\boxed{7}8}",
    "boxed{7}",
    "\\fbox{7}",
    "\\boxed {7",
    "answer: ",
    "Answer: 7 or 8",
    "Answer: 7\nAnswer: 8",
    "Answer: about 7",
    "A: 7\nB: 8",
    "Q: 7\nA:",
]

NUMERIC = [
    *[(text, gold) for text, gold in TRAPS if text not in _LOOSER],
    *[(said.format(answer.replace("%", "\\%")), gold) for answer, gold in UNEQUAL for said in SAID],
    *[(text, "7") for text in STRAY],
]

_FALSE_FORMULAS = [
    ("\\frac{1}{2}", "2"),
    ("\\frac{1}{2}", "1"),
    ("\\frac{2}{1}", "\\frac{1}{2}"),
    ("3\\frac{1}{2}", "\\frac{31}{2}"),
    ("\\frac{1}{2}5", "\\frac{1}{25}"),
    ("\\sqrt{2}", "2"),
    ("\\sqrt{2}", "1.41421356"),
    ("1.4142", "\\sqrt{2}"),
    ("3.14159265", "\\pi"),
    ("\\frac{22}{7}", "\\pi"),
    ("2\\pi", "\\pi"),
    ("2\\pi r", "\\pi r^2"),
    ("x+1", "x-1"),
    ("(x+1)^2", "x^2+1"),
    ("x^2+2x", "x^2+2x+1"),
    ("2n+1", "2k+1"),
    ("n=3k", "3"),
    ("3k", "3"),
    ("x=3", "x=4"),
    ("y=2x", "y=2x+1"),
    ("(1,2)", "(2,1)"),
    ("(1,2)", "[1,2]"),
    ("[1,2)", "(1,2]"),
    ("(1,2,3)", "(1,2)"),
    ("1,2", "1"),
    ("1", "1,2"),
    ("\\{1,2\\}", "\\{1,2,3\\}"),
    ("(-\\infty, 2)", "(-\\infty, 2]"),
    ("\\infty", "-\\infty"),
    ("11_2", "11_3"),
    ("101_2", "5"),
    ("1011_2", "1101_2"),
    ("5\\text{ cm}", "5\\text{ km}"),
    ("0.5", "50\\%"),
    ("50\\%", "0.5"),
    ("50\\%", "\\frac{1}{2}"),
    ("90^\\circ", "9^\\circ"),
    ("25^\\circ", "25_6"),
    ("9\\text{ a.m.}", "9^\\circ"),
    ("144 \\mbox{ m}^3", "144^\\circ"),
    ("18\\text{ hours}", "18\\text{ ways}"),
    ("8\\sqrt{3}\\text{ cm}", "8\\sqrt{3}\\text{ km}"),
    ("\\text{west}", "\\text{east}"),
    ("\\text{seat}", "\\text{east}"),
    ("seat", "\\text{east}"),
    ("DC", "CD"),
    ("\\text{(B)}", "\\text{(A)}"),
    ("B", "\\text{A}"),
    ("\\text{Carla}", "\\text{Evelyn}"),
    ("\\text{no}", "\\text{yes}"),
    ("\\text{not odd}", "\\text{odd}"),
    ("\\text{odd or even}", "\\text{odd}"),
    ("\\pm 5", "5"),
    ("5", "\\pm 5"),
    ("-5", "5"),
    ("|x|", "x"),
    ("\\sqrt{x^2}", "x"),
    ("\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}", "\\begin{pmatrix} 2 \\\\ 1 \\end{pmatrix}"),
    ("2^{100}+1", "2^{100}"),
    ("1267650600228229401496703205377", "2^{100}"),
    ("10^{20}+1", "10^{20}"),
    ("\\frac{1}{3}+10^{-9}", "\\frac{1}{3}"),
    ("0.33333333", "\\frac{1}{3}"),
    ("", "7"),
    ("?", "7"),
    ("\\text{seven}", "7"),
    ("7 = 8", "8"),
    ("7 = 8", "7"),
    ("7 \\neq 8", "7"),
    ("x \\neq 7", "7"),
    ("x < 7", "7"),
    ("7^{2}", "7"),
    ("7!", "7"),
    ("\\log 7", "7"),
    ("\\sin 7", "7"),
    ("7i", "7"),
    ("7 + 0i + 1", "7"),
    ("1{,}234", "234"),
    ("1,\\!234", "234"),
    ("12\\,345", "345"),
    ("\\{1,2\\}", "(1,2)"),
    ("(1,2)", "\\{1,2\\}"),
    ("\\{1,2\\}", "[1,2]"),
    ("5\\text{ cm}^2", "5\\text{ cm}^3"),
    ("5\\text{ cm}", "5\\text{ cm}^2"),
    ("5\\text{ square cm}", "5\\text{ cm}^3"),
    ("\\angle ABC", "\\angle ACB"),
    ("\\triangle ABC", "\\triangle BCA"),
    ("\\overline{AB}", "\\overline{AC}"),
    ("5 kg", "5 g"),
    ("7\\text{ quadrillion}", "7"),
    ("7\\text{ halved}", "7"),
]

SYMBOLIC = [
    *[(f"Thus $\\boxed{{{answer}}}$.", gold) for answer, gold in _FALSE_FORMULAS],
    *[(f"The answer is ${answer}$.", gold) for answer, gold in _FALSE_FORMULAS],
    *[(said.format(answer.replace("%", "\\%")), gold) for answer, gold in UNEQUAL for said in SAID],
    *[(text, "7") for text in STRAY],
    *[
        (said.format(answer), "7")
        for line in NOT_SEVEN
        for answer in line.replace("\\n", "\n").split("|")
        if answer not in _SEVEN
        for said in ("The answer is {}.", "We get \\boxed{{{}}}.")
    ],
]

_CHOICES = ("a dog", "the cat", "a dog and a cat", "I do not know")

_STATEMENTS = (
    "A|(A)|C|D|a|a dog|a cat|Because|Best|BB|B2|E|(E)|b|beta|B-|B'|AB|not B|not (B)|B or C|B and C|either B|B, C|B/C"
    "|(B) or (C)|B? C|B, not C|B if it barks|B unless|probably B|the dog|a cat and a dog|(A) the cat|A. the cat|B a dog"
    "|(B) a dog|C: the cat|vitamin B"
)

# Gold B.
CHOICE = [
    (text, "B", _CHOICES)
    for text in [
        *[f"The answer is {said}." for said in _STATEMENTS.split("|")],
        *[f"\\boxed{{{said}}}" for said in ("A", "a", "a dog", "B or C", "B, C", "\\text{A}", "BC", "", "?", "not B")],
        *[f"**{said}**" for said in ("A", "a dog", "B or C", "Bold", "a")],
        *[f"Answer: {said}" for said in ("A", "a dog", "B or C", "Be careful", "", "a", "none of B and C")],
        "A dog is a good friend, and a cat is a good friend too.",
        "B is wrong.",
        "It is not B.",
        "Not \\boxed{B}.",
        "It isn't \\boxed{B}",
        "B or \\boxed{A}",
        "\\boxed{B} or \\boxed{C}",
        "\\boxed{B}, \\boxed{C}",
        "\\boxed{B} or C",
        "\\boxed{B",
        "The answer is B. The answer is C.",
        "The answer is B. Wait, C.",
        "The answer is B.\nNo, it is C.",
        "The answer is B.\nAnswer: C",
        "Answer: B\nAnswer: A",
        "The answer is (B). (C) is right as well.",
        "I doubt that the answer is B.",
        "Ben says the answer is B.",
        "If cats bark, the answer is B.",
        "Option B says the cat. The answer is C.",
        "(A) a dog (B) the cat (C) both",
        "A B C D",
        "B\nC",
        "A\nB\nC\nD",
        "The options are A, B, C and D.",
        "Vitamin B",
        "Plan B is a dog.",
        "the cat or a dog",
        "not the cat",
        "the cat?!",
        "",
        "a",
        "The answer is",
        "The answer is: ",
        "Be that as it may.",
        "A: the cat",
        "**A:** the cat",
        "A: I think the cat",
    ]
]  # fmt: skip

_NOT_PARIS = (
    "London|Not Paris|Paris or London|Paris, Texas|Pari|Pariss||The|a|Paris and London|I think it is Paris"
    "|Paris?? London|The answer is London.|The answer is not Paris.|unanswerable"
    "|The answer is Paris. The answer is London.|Paris\nLondon"
    "|The answer is Paris or London.|yes|no|The answer is Paris.\nOr London.|Paris is in France."
    "|\\boxed{London}|Ben says the answer is Paris."
)
_NOT_NO = "yes|Yes, no doubt.|Yes.|not|none|No one|No and yes|No, yes|nope|unanswerable"
_NOT_FICTION = "No, they could only be caught by a virgin|No.|no|Yes, unicorns are fictional|unicorns are fictional"
_NOT_HALF = "125|1.25|-12.5|12|12.50|12 5|12-5"
_ANSWERS = "answerable|no|It can be answered|unknown soldier|Paris"
PROSE = (
    "Yes, the team agreed to use 2 buttons and a wheel, since the remote control must not cost more than 12.5 euros."
)
_PUNCTUATED = (
    "34=3/4|3/4=34|3:4=34|106=10^6|10^6=106|1030=10:30|10:30=1030|23=2-3|2–3=23|44=4+4|24=2*4|125=1,25|1.25=1,25|411=4'11"
    "|5=5%|$5=5%|<5=5|~5=5|C=C++|C#=C|C++=C#"
)
_NOT_PROSE = [
    PROSE.replace("2", "3"),
    PROSE.replace("12.5", "12"),
    PROSE.replace("12.5", "1.25"),
    PROSE.replace("12.5", "125"),
    PROSE.replace("12.5", "-12.5"),
    PROSE.replace("not ", ""),
    PROSE.replace("agreed", "refused"),
    PROSE.replace("Yes", "No"),
    PROSE.split(",")[0] + ", the team did.",
    PROSE[: len(PROSE) // 2],
    PROSE + " Or so they thought.",
    PROSE + "\n" + PROSE,
    f"It is wrong that {PROSE}",
    f"The answer is {PROSE}\nNo, the answer is another.",
    "yes",
    "The answer is",
    "unanswerable",
]

SHORT = [
    *[(text, ("Paris", "the city of Paris")) for text in _NOT_PARIS.split("|")],
    *[(text, ("no",)) for text in _NOT_NO.split("|")],
    *[(text, ("unanswerable",)) for text in _ANSWERS.split("|")],
    *[(text, ("No, unicorns are fictional",)) for text in _NOT_FICTION.split("|")],
    *[(text, ("12.5",)) for text in _NOT_HALF.split("|")],
    *[(said, (gold,)) for said, _, gold in (pair.partition("=") for pair in _PUNCTUATED.split("|"))],
    *[(text, golds) for text in _NOT_PROSE for golds in [(PROSE,), ("no", PROSE)]],
]
