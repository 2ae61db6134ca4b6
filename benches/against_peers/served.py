"""candle-attention or candle, in the process that serves them."""

from safetensors.torch import load_file


class Served:
    """A contender for a job. Its answers go through a file at `path`."""

    def __init__(self, server, job, contender, path):
        self.server, self.job, self.contender, self.path = server, job, contender, path
        self.time = server.timer(job, contender)

    def answer(self):
        self.server.ask(do="answer", id=self.job, contender=self.contender, to=str(self.path))
        return load_file(self.path)
