"""The verifier: what a reply's number is, decided case by case, and what holds of any reply."""

import time
from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.verify import Verdict, check, number

# (reply, gold, strict, lenient, found). Where a verdict could have been another one, docs/maths.md gives the reason.
CASES = [
    # The form that is asked for.
    ("#### 42", "42", True, True, "42"),
    ("6 * 7 = 42\n#### 42", "42", True, True, "42"),
    ("6 * 7 = 42\n#### 42\n", "42", True, True, "42"),
    ("6 * 7 = 42\n  #### 42", "42", True, True, "42"),  # as the lines of a transcript are indented
    ("#### 1,200", "1200", True, True, "1,200"),
    ("#### 1200", "1,200", True, True, "1200"),
    ("#### -78,910.5", "-78910.5", True, True, "-78,910.5"),
    ("#### 42.00", "42", True, True, "42.00"),
    ("#### 042", "42", True, True, "042"),
    ("#### 43", "42", False, False, "43"),
    # Near it: right, but not in the form.
    ("####42", "42", False, True, "42"),
    ("####  42", "42", False, True, "42"),
    ("### 42", "42", False, True, "42"),
    ("##### 42", "42", False, True, "42"),
    ("#### 42.", "42", False, True, "42"),
    ("#### $42", "42", False, True, "$42"),
    ("#### 42 dollars", "42", False, True, "42"),
    ("#### **42**", "42", False, True, "42"),
    ("#### The answer is 42", "42", False, True, "42"),
    ("#### x = 42", "42", False, True, "42"),
    ("#### 42\nThat is all.", "42", False, True, "42"),
    ("42\n####", "42", False, True, "42"),  # cut off behind the signs
    ("so it is 42 #### 42", "42", False, True, "42"),  # not on a line of its own
    ("#### 42\n#### 42", "42", False, True, "42"),
    ("#### Step 1\n6 * 7 = 42\n#### 42", "42", False, True, "42"),  # a heading
    ("#### Step 1: multiply 6 by 7\n6 * 7 = 42\nThe answer is 42.", "42", False, True, "42"),
    ("#### Answer:\n42", "42", False, True, "42"),
    ("#### Final answer\n\\boxed{42} of 50", "42", False, True, "42"),
    ("#### Final answer: 42\n", "42", False, True, "42"),
    ("#### 1. Add\n3 + 4 = 7\n#### 2. Multiply\n7 * 2 = 14\n#### 14", "14", False, True, "14"),  # items of a list
    ("#### 42. That is all.", "42", False, True, "42"),
    ("####12a", "12", False, False, ""),
    ("#### 12a", "12", False, False, ""),
    ("#### forty-two", "42", False, False, ""),
    ("41 + 1\n#### none", "1", False, False, ""),  # what stands behind the signs decides
    # Contradictions.
    ("#### 5\n#### 7", "7", False, False, ""),
    ("#### 5\n#### 7", "5", False, False, ""),
    ("#### 5 or 7", "5", False, False, ""),
    ("#### 5, 7", "5", False, False, ""),
    ("#### 5-7", "5", False, False, ""),
    ("#### 5/7", "5", False, False, "5/7"),
    ("The answer is 5 or 7.", "7", False, False, ""),
    ("The answer is 5 to 7.", "5", False, False, ""),
    ("The answer is 1, 2, 3, 4, 5.", "1", False, False, ""),
    ("The answer is 5 or 5.0.", "5", False, True, "5"),
    ("The answer is 5, not 7.", "5", False, True, "5"),
    ("#### either 5 or 7", "7", False, False, ""),
    ("The answer is either 5 or 7.", "7", False, False, ""),
    ("The answer is both 5 and 7.", "7", False, False, ""),
    ("The answer is between 5 and 7.", "7", False, False, ""),
    ("#### maybe 5 or 7", "7", False, False, ""),
    ("The answer is x = 5 or x = 7.", "7", False, False, ""),
    ("#### 5 or maybe 7", "5", False, False, ""),
    ("#### 5, or else 7", "5", False, False, ""),
    ("#### 5 and also 7", "5", False, False, ""),
    ("#### 5 and not 7", "5", False, True, "5"),
    ("#### 5 or so. 7 were left", "5", False, True, "5"),
    ("The answer is 42 apples, and Ada got 2.", "42", False, True, "42"),
    ("The answer is 5. No, wait: the answer is 7.", "7", False, True, "7"),
    ("The answer is 5. No, wait: the answer is 7.", "5", False, False, "7"),
    ("The answer is 5.\n#### 7", "7", True, True, "7"),
    ("The answer is 5.\n#### 7", "5", False, False, "7"),
    (r"\boxed{5} #### 7", "7", False, True, "7"),
    # In a box.
    (r"So we get \boxed{42}.", "42", False, True, "42"),
    (r"\boxed{\frac{3}{4}}", "0.75", False, True, "3/4"),
    (r"\boxed{\dfrac{3}{4}}", "3/4", False, True, "3/4"),
    (r"\boxed{1{,}200}", "1200", False, True, "1,200"),
    (r"\boxed{-\frac{1}{2}}", "-0.5", False, True, "-1/2"),  # the fraction's own minus
    (r"\boxed{\frac12}", "1/2", False, True, "1/2"),
    (r"\boxed{1\frac{1}{2}}", "1.5", False, True, "1 1/2"),
    (r"5 - \frac{1}{2} = 4.5", "4.5", False, True, "4.5"),
    (r"\boxed{-½}", "-1/2", False, True, "-1/2"),
    (r"\boxed{2\sqrt{3}}", "2", False, False, ""),  # a root is no number
    (r"\boxed{\sqrt{3}}", "3", False, False, ""),
    (r"\boxed{\sqrt{16} = 4}", "4", False, True, "4"),
    (r"\boxed{2\pi}", "2", False, False, ""),
    (r"\boxed{2 \pi}", "2", False, False, ""),
    (r"\boxed{2 \cdot \pi}", "2", False, False, ""),
    ("#### 2 pi", "2", False, False, ""),
    (r"\boxed{\frac{\pi}{2}}", "2", False, False, ""),
    (r"\boxed{\frac{2\pi}{3}}", "3", False, False, ""),
    (r"\boxed{\frac{\sqrt{3}}{2}}", "2", False, False, ""),
    (r"\boxed{\sqrt{\frac{1}{2}}}", "0.5", False, False, ""),
    (r"\boxed{\sqrt[3]{8}}", "3", False, False, ""),
    (r"\boxed{\sqrt[3]{8} = 2}", "2", False, True, "2"),
    (r"\boxed{\cfrac{3}{4}}", "0.75", False, True, "3/4"),
    (r"\boxed{10,\!000}", "10000", False, True, "10,000"),
    (r"\boxed{- 5}", "-5", False, True, "-5"),
    ("#### 1 200", "1", False, False, ""),  # two numbers, or one: nobody knows
    ("#### 1 200", "1200", False, False, ""),
    ("#### -$12 345.", "12", False, False, ""),
    ("#### 1 200/3", "401/3", False, False, "1 200/3"),
    ("#### 1'200", "1200", False, True, "1,200"),
    ("#### 1’234’567", "1234567", False, True, "1,234,567"),
    (r"\boxed{18\%}", "18", False, True, "18%"),
    (r"\boxed{\$18}", "18", False, True, "$18"),
    (r"\boxed{12 \text{ hours}}", "12", False, True, "12"),
    (r"\boxed{x = 5}", "5", False, True, "5"),
    (r"First \boxed{5}, then \boxed{7}, 9 in all", "7", False, True, "7"),
    (r"\boxed{x}, and 3", "3", False, False, ""),
    (r"It is 42: \boxed{4", "42", False, False, "4"),  # cut off
    # Behind "answer".
    ("The answer is 42", "42", False, True, "42"),
    ("Answer: 42", "42", False, True, "42"),
    ("ANSWER = 42", "42", False, True, "42"),
    ("The final answer is: $42.", "42", False, True, "$42"),
    ("The answer is:\n42", "42", False, True, "42"),
    ("The answer to the question is therefore 42 apples, of which 2 are bad.", "2", False, True, "2"),  # see docs
    ("The answer is 42 apples, as Ada had 40 and got 2.", "42", False, True, "42"),
    ("The answer is 20 - 5 = 15 dollars.", "15", False, True, "15"),
    ("The answer is 20 dollars - 5 dollars = 15 dollars.", "15", False, True, "15"),
    ("The answer is 20 -5 = 15.", "15", False, True, "15"),
    ("The answer is 10% of 50 = 5.", "5", False, True, "5"),
    ("The answer is 3/4 = 0.75 = 75%.", "0.75", False, True, "75%"),
    ("The answer is 7 + 5.", "12", False, False, ""),
    ("The answer is 7 + 5.", "5", False, False, ""),
    ("The answer is 100 hours for 4 workers.", "100", False, True, "100"),
    ("The answer is that 4 workers take 100 hours.", "100", False, True, "100"),
    ("The answer to 6 * 7 is 42. Check: 42 / 7 = 6.", "42", False, True, "42"),
    ("The answer to 1.5 * 4 is 6. Check: 6 / 4 = 1.5", "6", False, True, "6"),
    ("The final answer after 3 steps is 24. I used 12 twice.", "24", False, True, "24"),
    ("Answer to 6 * 7: 42. Check: 42 / 7 = 6", "42", False, True, "42"),
    ("Answer: 42. Check: 42 / 7 = 6", "42", False, True, "42"),
    ("Answer: x = 5. Check: 5 + 2 = 7", "5", False, True, "5"),
    ("Answer: Ada has 7 apples.", "7", False, True, "7"),
    ("Answer: Ada has 3 apples and buys 4 more. So she has 7 apples.", "7", False, True, "7"),  # a heading
    ("**Answer:**\n\nFirst, 8 * 12 = 96 seats.\nSo 96 - 57 = 39 seats were empty.", "39", False, True, "39"),
    ("**Answer:**\n1. Add 3 and 4.\n2. Double it: 14.", "14", False, True, "14"),
    ("To answer, note that x = 5. So the total is 42.", "42", False, True, "42"),
    # Calculations in other words and signs.
    ("The answer is 12 divided by 3 = 4", "4", False, True, "4"),
    ("The answer is 12 multiplied by 3", "12", False, False, ""),
    ("The answer is 3 plus 4 equals 7.", "7", False, True, "7"),
    ("The answer is 3 times 4, which is 12.", "12", False, False, ""),
    ("The answer is 42, which is 6 more than 36.", "42", False, True, "42"),
    ("The answer is 12 = 3 x 4.", "12", False, True, "12"),
    ("The answer is 3(4) = 12.", "12", False, True, "12"),
    ("The answer is 2**3 = 8.", "8", False, True, "8"),
    ("#### 2**3", "2", False, False, ""),
    ("#### **42** (6 * 7)", "42", False, True, "42"),
    ("#### 10^3", "1000", False, False, ""),
    ("#### 10^3", "10", False, False, ""),
    ("The answer is twelve.", "12", False, False, ""),
    ("Answer in words: none. 7 + 5 = 12", "12", False, True, "12"),
    # The last number.
    ("42", "42", False, True, "42"),
    ("4 workers take 100 hours", "100", False, True, "100"),
    ("4 workers take 100 hours", "4", False, False, "100"),
    ("7 + 5 = 12", "12", False, True, "12"),
    ("16-3-4=9", "9", False, True, "9"),
    ("It costs 3-5", "5", False, True, "5"),
    ("COVID-19", "-19", False, False, "19"),
    ("The score was 10-3", "-3", False, False, "3"),
    ("She has 18 eggs left.", "18", False, True, "18"),
    ("twelve", "12", False, False, ""),
    ("", "0", False, False, ""),
    ("I don't know.", "1", False, False, ""),
    # Numbers and how they are written.
    ("#### 3/4", "0.75", False, True, "3/4"),
    ("#### 0.75", "3/4", True, True, "0.75"),
    ("#### .75", "3/4", False, True, ".75"),
    ("#### 75%", "0.75", False, True, "75%"),
    ("#### 75%", "75", False, True, "75%"),
    ("#### 75 percent", "75", False, True, "75 percent"),
    ("#### 0.75", "75%", True, True, "0.75"),
    ("#### 0.75%", "75%", False, False, "0.75%"),
    ("#### 0.75%", "0.0075", False, True, "0.75%"),
    ("#### 1 1/2", "1.5", False, True, "1 1/2"),
    ("#### 1½", "1.5", False, True, "1 1/2"),
    ("#### 0.33", "1/3", False, False, "0.33"),
    ("#### 33.3", "33.33", False, False, "33.3"),
    ("#### 1.5e3", "1500", False, True, "1.5e3"),
    ("#### 1.5 × 10^3", "1500", False, True, "1.5 × 10^3"),
    (r"#### 1.5 \times 10^{3}", "1500", False, True, "1.5 × 10^3"),
    ("#### 15·10⁻²", "0.15", False, True, "15*10^-2"),
    ("#### 2 million", "2000000", False, True, "2"),
    ("#### 2 millions", "2000000", False, True, "2"),
    ("She has 3 hundred", "300", False, True, "3"),
    ("She has 3 hundred", "3", False, False, "3"),
    ("3 dozen", "3", False, True, "3"),
    ("3 dozen", "36", False, False, "3"),
    ("#### $12k", "12000", False, True, "$12"),
    ("#### −5", "-5", False, True, "-5"),
    ("#### - 5", "-5", False, True, "-5"),
    ("#### ( - 5 )", "-5", False, True, "-5"),
    ("#### \u20115", "-5", False, True, "-5"),
    ("#### \u20105", "-5", False, True, "-5"),
    ("The answer is negative 3.", "-3", False, True, "-3"),
    ("It is minus 3 degrees.", "-3", False, True, "-3"),
    ("The answer is 5 minus 3", "-3", False, False, ""),
    ("The answer is 5 apples minus 3 apples = 2 apples", "2", False, True, "2"),
    ("#### +5", "5", False, True, "+5"),
    ("#### $-5", "-5", False, True, "$-5"),
    ("#### -$5", "-5", False, True, "-$5"),
    ("#### -5", "5", False, False, "-5"),
    ("#### 5€", "5", False, True, "5"),
    ("#### 1\u202f200", "1200", False, True, "1,200"),
    ("#### ４２", "42", False, True, "42"),
    ("#### 1,20", "120", False, False, ""),  # a comma that is no separator of thousands
    ("#### 1,2345", "12345", False, False, ""),
    ("#### 1.200,50", "1200.5", False, False, ""),
    ("#### 12km", "12", False, True, "12"),
    ("#### 12 m²", "12", False, True, "12"),
    (r"\boxed{12 \text{ cm}^2}", "12", False, True, "12"),
    (r"\boxed{12\,\mathrm{cm}^{3}}", "12", False, True, "12"),
    ("The answer is 12 cm$^2$.", "12", False, True, "12"),
    (r"12 cm\(^2\)", "12", False, True, "12"),
    # "of" behind a part multiplies, behind what is counted it does not.
    ("#### 10% of 50 = 5", "5", False, True, "5"),
    ("#### 3/4 of 12 = 9", "9", False, True, "9"),
    ("#### 6 bags of 10 apples", "6", False, True, "6"),
    ("#### 4 packs of 6 = 24 cans", "24", False, True, "24"),
    ("#### 0.2 of 50 = 10", "10", False, True, "10"),
    ("The answer is 7 out of 10.", "7", False, True, "7"),
    # Divided twice: no number of it is cut.
    ("#### 120 / 12 / 2 = 5", "5", False, True, "5"),
    ("The answer is 600/25/4 = 6", "6", False, True, "6"),
    # A step's number is not what is stated: the problem that is told again is no next one.
    ("Step 1: Read.\nProblem: Ada has 3 apples and buys 4.\n#### 7", "7", True, True, "7"),
    ("1. Read.\nQuestion: 3 + 4?\n7", "7", False, True, "7"),
    ("7.\nQuestion: What is 2 + 9?", "7", False, True, "7"),
    ("7. So she has seven.\nQuestion: What is 2 + 9?", "7", False, True, "7"),
    ("#### 18. She makes eighteen dollars.\n\nQuestion: What is 2 + 9?\n#### 11", "18", False, True, "18"),
    ("#### 3rd", "3", False, True, "3"),
    ("#### 2x", "2", False, False, ""),
    ("#### B12", "12", False, False, ""),
    ("#### 12_000", "12000", False, False, ""),
    ("#### 2024-05-01", "2024", False, False, ""),
    ("#### 5/1/2024", "5", False, False, ""),
    ("#### May 5, 2024", "2024", False, True, "2024"),  # words first: the last number
    ("#### 12:30", "12", False, False, ""),
    ("#### 3:4", "0.75", False, False, ""),
    ("#### 1.2.3", "1.2", False, False, ""),
    ("#### 1/0", "1", False, False, ""),
    ("#### 1e999999999", "1", False, False, ""),
    ("#### " + "9" * 5000, "9", False, False, ""),
    # The policy runs on into a problem of its own: what it says there does not count.
    ("#### 42\n\nQuestion: What is 1 + 1?\n#### 2", "42", False, True, "42"),
    ("#### 42\n**Question:** What is 1 + 1?\n#### 2", "42", False, True, "42"),
    ("#### 42\n**Question 2**: What is 1 + 1?\n#### 2", "42", False, True, "42"),
    ("#### 42\nQuestion 2: What is 1 + 1?\n#### 2", "42", False, True, "42"),
    ("#### 42\n### Question:\nWhat is 1 + 1?\n#### 2", "42", False, True, "42"),
    ("It is 42.\nProblem: What is 1 + 1?\nThe answer is 2", "2", False, False, "42"),
    # The problem itself, said again: no number stands before it.
    ("Let us solve it.\n\nProblem: what is 6 * 7?\n#### 42", "42", True, True, "42"),
    ("Here is it.\nQ: What is 6*7?\nA: 42", "42", False, True, "42"),
    ("Problem: what is 6 * 7?\n#### 42\nProblem: what is 1 + 1?\n#### 2", "42", False, True, "42"),
]


@pytest.mark.parametrize(("reply", "gold", "strict", "lenient", "found"), CASES)
def test_each_verdict_is_the_one_that_was_decided(reply, gold, strict, lenient, found):
    assert check(reply, gold) == Verdict(strict, lenient, found)


def test_the_cases_are_many_and_different():
    assert len({case[:2] for case in CASES}) == len(CASES) >= 80


@pytest.mark.parametrize("gold", ["", "none", "twelve", "5 or 7", "3 + 4", "12a", "12:30", "- 42 -", "1,20"])
def test_a_gold_number_that_is_none_is_refused(gold):
    assert number(gold) is None
    with pytest.raises(ValueError, match="is no number"):
        check("#### 42", gold)


@pytest.mark.parametrize(
    ("gold", "value"), [("42", 42), ("1,200", 1200), ("-3.5", "-7/2"), ("$18", 18), ("3/4", "3/4"), ("12 apples", 12)]
)
def test_a_gold_number_is_read_exactly(gold, value):
    assert number(gold).value == Fraction(value)


# ------------------------------------------------------------------------------------------------- of any reply at all

ALPHABET = "0123456789.,-+*/=%$#\\{}()\n answerisboxed:eE½²−"
DECIMALS = st.decimals(-(10**9), 10**9, places=3).map(lambda d: d.normalize() + 0)


@given(st.one_of(st.text(), st.text(ALPHABET)), st.one_of(st.text(ALPHABET), st.integers().map(str)))
@settings(max_examples=400, deadline=None)
def test_any_reply_has_a_verdict_and_strict_is_never_more_lenient(reply, gold):
    if number(gold):
        verdict = check(reply, gold)
        assert verdict.lenient or not verdict.strict
        assert not verdict.lenient or verdict.found
        assert check(reply, gold) == verdict


@given(DECIMALS, st.sampled_from(["{:f}", "{:,f}", "{:f}00"]), st.text("abc xyz,;\n", max_size=20))
@settings(max_examples=300, deadline=None)
def test_the_asked_form_is_strict_whatever_stands_before(value, form, before):
    text = form.format(value)
    if text.endswith("00") and "." not in text:
        text = format(value, "f")
    verdict = check(f"{before}\n#### {text}", format(value, "f"))
    assert (verdict.strict, verdict.lenient) == (True, True)
    assert Decimal(verdict.found.replace(",", "")) == value


@given(DECIMALS, DECIMALS)
@settings(max_examples=200, deadline=None)
def test_equal_numbers_alone_are_right(a, b):
    assert check(f"#### {a:f}", f"{b:f}").lenient == (a == b)
    assert check(f"The answer is {a:f} or {b:f}.", f"{b:f}").lenient == (a == b)
    assert check(f"#### {a:f}\n#### {b:f}", f"{b:f}").lenient == (a == b)


@given(st.integers(-999, 999), st.integers(1, 999))
@settings(max_examples=200, deadline=None)
def test_a_fraction_is_its_decimal_and_its_percentage(a, b):
    assert check(f"#### {a}/{b}", f"{a}/{b}").lenient
    thousandths = Fraction(a, 1000)
    assert check(f"#### {Decimal(a) / 1000:f}", f"{a}/1000").lenient
    assert check(f"#### {Decimal(a) / 10:f}%", f"{a}/1000").lenient
    assert check(f"#### {thousandths.numerator}/{thousandths.denominator}", f"{Decimal(a) / 1000:f}").lenient


@given(st.integers(0, 10**6), st.sampled_from(["dollars", "eggs left", "km/h", "square feet", "per day", "%", "."]))
@settings(max_examples=100, deadline=None)
def test_units_change_nothing_for_the_lenient_reader(value, unit):
    for form in ("#### {} {}", "The answer is {} {}", "\\boxed{{{} \\text{{{}}}}}", "She has {} {}"):
        assert check(form.format(value, unit), str(value)).lenient


@pytest.mark.parametrize(
    "piece",
    [
        *["1", "1,", "1/", "1 ", "-", "1.", "#### ", "answer is ", "\\boxed{", "\\frac{", "=1", "1:", "a1", "1e", "½"],
        *["answer: a 1.\n", "#### 1. a\n", "\\sqrt[", "\nquestion ", "1 or x = "],
    ],
)
def test_a_reply_takes_time_in_proportion_to_its_length(piece):
    def seconds(pieces):
        took = []
        for _ in range(2):  # the lesser one: other programs run beside it
            started = time.process_time()
            check(piece * pieces, "1")
            check("#### " + piece * pieces, "1")
            took.append(time.process_time() - started)
        return min(took)

    assert seconds(8_000) < 4 * 16 * seconds(500)  # by the square it were 256 times
