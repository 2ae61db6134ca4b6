"""SplitMix64, as in src/random.rs, for the scripts that train an example's model with PyTorch."""

MASK = 2**64 - 1


class Random:
    """Random numbers that are a function of seed, purpose and step."""

    def __init__(self, seed, purpose, step):
        self.state = seed
        for word in [*purpose.encode(), step]:
            self.state = self.next() ^ word

    def next(self):
        self.state = (self.state + 0x9E3779B97F4A7C15) & MASK
        z = self.state
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & MASK
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB & MASK
        return z ^ (z >> 31)

    def below(self, count):
        return self.next() % count

    def unit(self):
        return (self.next() >> 11) / 2**53
