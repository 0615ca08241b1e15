"""Seconds on a GPU by CUDA events, in the four ways that people mean.

cold        one call with nothing of its inputs in L2; the host is ahead, so this is the device's time
hot         calls back to back on the same inputs: the slower of device and host, as in a loop
graph_*     the same two of a replay of the call as a CUDA graph, which the host cannot hold up
"""

import torch

HOLD, LONGEST_HOLD = 2_000_000, 32_000_000  # clock cycles; at 2 GHz 1 ms and 16 ms
CALLS = 20  # back to back


class CudaTimer:
    def __init__(self):
        cache = getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 0)
        self._flush = torch.zeros(max(2**28, 4 * cache) // 4, device="cuda")
        self._hold = HOLD

    def cold(self, run):
        """Seconds of one call after the caches were filled with something else.

        They are filled by reading: lines that are written to would have to be written back in the time that
        is measured.
        """
        while True:
            self._flush.sum()
            torch.cuda._sleep(self._hold)  # the device waits until the host has issued the whole call
            seconds, late = self._between(run)
            if not late or self._hold >= LONGEST_HOLD:
                return seconds
            self._hold *= 2

    def hot(self, run):
        """Seconds a call, of several back to back."""

        def repeated():
            for _ in range(CALLS):
                run()

        run()
        return self._between(repeated)[0] / CALLS

    def captured(self, run):
        """A function that replays `run` as a CUDA graph; raises what the capture raises."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # warm-up outside the capture
            for _ in range(3):
                run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = run()

        def replay():
            graph.replay()
            return result  # kept: its memory is the graph's

        return replay

    def _between(self, run):
        """(seconds, whether the device had begun before the host was done)"""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        result = run()
        end.record()
        late = start.query()
        end.synchronize()
        del result
        return start.elapsed_time(end) / 1e3, late
