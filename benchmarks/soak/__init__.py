"""The whole server under load, faults and bad input, against the numbers that it promises.

    python -m benchmarks.soak [MODEL] [--only G2 G3 …] [--seconds 10]

Each goal starts its own server on loopback and ends it. Loads are bounded in number and time. G9,
health, is looked at under all of them. The exit status is 1 when a goal is missed. Ends in one
JSON line.
"""
