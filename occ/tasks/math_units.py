"""Units and other words beside a number, in one spelling and one scale."""

from __future__ import annotations

import re
from fractions import Fraction

# (scale, dimension, names). Two units of one dimension are converted exactly.
_TABLE = r"""
1/1000000000 length nm nanometer nanometre 纳米
1/1000000 length micron um micrometer micrometre 微米
1/1000 length mm millimeter millimetre 毫米
1/100 length cm centimeter centimetre 厘米
1/10 length dm decimeter decimetre 分米
1 length m meter metre 米
1000 length km kilometer kilometre 千米 公里
127/5000 length in inch inches 英寸
381/1250 length ft foot feet 英尺
1143/1250 length yd yard
201168/125 length mi mile 英里
1/1000 time ms millisecond 毫秒
1 time s sec second 秒 秒钟
60 time min minute 分钟 分
3600 time h hr hour 小时 时
86400 time day 天 日
604800 time week wk 周
1 years year yr 年 岁
1 months month 个月 月
1/1000000 mass mg milligram 毫克
1/1000 mass g gram 克
1 mass kg kilogram 千克 公斤
1000 mass ton tonne 吨
1 pounds lb pound gbp
1/1000 volume L l liter litre 升
1/1000000 volume ml milliliter millilitre 毫升
1/100 money cent cents ¢ 分钱
1 money dollar usd
1 yuan yuan 元 块
1 euro euro eur
1 % percent
1 degree degree deg 度
1 radian radian rad 弧度
1 celsius celsius 摄氏度
1 force N newton
1 energy J joule
1 power W watt
1 voltage V volt
1 current A amp ampere
1 pressure Pa pascal
1 frequency Hz hertz
1 temperature K kelvin
1 amount mol mole
1 charge coulomb
1 ev eV electronvolt
1 erg erg
"""
_PREFIXES: dict[str, Fraction | int] = {
    "k": 1000,
    "M": 10**6,
    "G": 10**9,
    "m": Fraction(1, 1000),
    "u": Fraction(1, 10**6),
    "n": Fraction(1, 10**9),
}
_PREFIXED = ("N", "J", "W", "V", "Pa", "Hz", "eV", "mol")

Unit = tuple[Fraction, tuple[tuple[str, int], ...]]
"""What a number is multiplied by, and powers of dimensions."""

NONE: Unit = (Fraction(1), ())


def names(text: str) -> list[str]:
    """The words of a table."""
    return text.split()


# Numbers of things, and what only says that it is a number.
_COUNTERS = frozenset(
    names(
        "unit units in_total 个 种 人 条 次 张 只 本 名 位 件 颗 块钱 组 对 "
        "根 棵 辆 枚 单位 项 倍 页 道"
    )
)
MULTIPLES = {"dozen": 12, "hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9} | {
    "trillion": 10**12,
    "万": 10**4,
    "亿": 10**8,
}
_POWERS = {
    "square": 2,
    "sq": 2,
    "平方": 2,
    "cubic": 3,
    "cu": 3,
    "立方": 3,
    "squared": 2,
    "cubed": 3,
}
# A phrase with one of these says more than what is counted.
_REFUSED = frozenset(
    names(
        "not no than least most about if but approximately around nearly minus plus times "
        "modulo mod over by where when with is are was isn wrong never except without either "
        "nor less more factorial half halves third thirds quarter quarters fifth fifths tenth "
        "tenths hundredth hundredths thousandth thousandths doubled tripled twice negative maybe "
        "perhaps probably possibly guess root"
    )
)


def _units() -> dict[str, Unit]:
    found: dict[str, Unit] = {}
    for line in _TABLE.strip().splitlines():
        scale, dimension, *names = line.split()
        powers = ((dimension, 1),)
        if dimension == "volume":
            powers = (("length", 3),)
        found |= dict.fromkeys(names, (Fraction(scale), powers))
        found |= dict.fromkeys((f"{n}s" for n in names if len(n) > 2), (Fraction(scale), powers))
    for name in _PREFIXED:
        for prefix, factor in _PREFIXES.items():
            found[prefix + name] = (Fraction(factor), found[name][1])
    mile, hour = found["mi"], found["h"]
    found["mph"] = (mile[0] / hour[0], (("length", 1), ("time", -1)))
    found["kph"] = (Fraction(1000, 3600), (("length", 1), ("time", -1)))
    return found


_UNITS = _units()
LETTERS = frozenset([name for name in _UNITS if len(name) == 1] + ["C"])  # in roman type
SINGLE = frozenset("mghsJNVWKLAT")  # letters that are units after a number and a space
# Letters together that are a unit even if nothing marks them as text.
PLAIN = frozenset(name for name in _UNITS if name.isascii() and name.isalpha() and len(name) > 1)


def word(name: str) -> Unit | None:
    """The unit of one word; of an unknown one itself, and None for what is none.

    >>> word("cm"), word("hours")[1], word("apples")
    ((Fraction(1, 100), (('length', 1),)), (('time', 1),), (Fraction(1, 1), (('apple', 1),)))
    """
    name = name.strip(".")
    lower = name.lower()
    if lower in _REFUSED:
        return None
    if lower in _COUNTERS:
        return NONE
    if lower in MULTIPLES:
        return Fraction(MULTIPLES[lower]), ()
    for known in (name, lower) if len(name) > 1 else (name,):
        if known in _UNITS:
            return _UNITS[known]
    if len(name) == 1:
        return Fraction(1), ((name, 1),)
    singular = lower[:-1] if len(lower) > 3 and lower.endswith("s") else lower
    return Fraction(1), ((singular, 1),)


def times(first: Unit, second: Unit, power: int = 1) -> Unit:
    """The product of a unit with a power of another."""
    dimensions = dict(first[1])
    for name, exponent in second[1]:
        dimensions[name] = dimensions.get(name, 0) + power * exponent
    kept = tuple(sorted((name, exponent) for name, exponent in dimensions.items() if exponent))
    return first[0] * second[0] ** power, kept


def phrase(words: list[str | int]) -> Unit | None:
    """The unit of several words, numbers being powers of the word before them.

    >>> phrase(["square", "feet"]) == phrase(["ft", 2]), phrase(["km", "/", "h"])[1]
    (True, (('length', 1), ('time', -1)))
    >>> phrase(["more", "apples"]) is None
    True
    """
    total, sign, power = NONE, 1, 1
    last: Unit = NONE
    unknown: list[str] = []
    for item in words:
        if isinstance(item, int):
            total = times(total, last, sign * (item - 1))
            continue
        for name in re.split(r"(平方|立方)", item):
            if not name:
                continue
            if name.lower() in ("per", "/", "每"):
                sign = -1
            elif name.lower() in _POWERS:
                if name.lower() in ("squared", "cubed"):
                    if last == NONE:
                        return None  # "5 squared" is 25
                    total = times(total, last, sign * (_POWERS[name.lower()] - 1))
                else:
                    power = _POWERS[name.lower()]
            elif name.lower() == "of":
                return total
            elif name.lower() not in ("the", "a", "different", "possible", "distinct"):
                found = word(name)
                if found is None:
                    return None
                known = not found[1] or any(d != name.lower().rstrip("s.") for d, _ in found[1])
                if not known:
                    if unknown and sign == 1:
                        total = times(total, last, -power)  # "red balls" are balls
                    unknown.append(name)
                last = found
                total = times(total, last, sign * power)
                power = 1
    return total
