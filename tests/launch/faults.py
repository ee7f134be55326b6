"""Faults that are planted into a rank before it starts: what happens, at which step, on which ranks.

{"kind": …, "step": k, "ranks": [r, …], …}      steps count from 1; ranks: those that it happens to

kill, stop, term, usr1   SIGKILL, SIGSTOP, SIGTERM, SIGUSR1 to itself at `point`: "forward"; "collective" number `n` of the step;
                         "evaluation"; "save" (the n-th time that a save makes something safe on disk, step not counted)
nan                      the gradient of one weight becomes NaN
nan_loss                 its part of the loss becomes NaN
sleep                    it does not return from a forward pass
full                     the n-th time that a save makes something safe on disk there is no space left
limit                    from the step on no file can grow beyond `bytes`
jump                     the loss, where it is looked at, is 50 more, whenever sample `sample` is in the step
"""

import errno
import os
import resource
import signal
import time
from typing import Any

import torch

SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "term": signal.SIGTERM, "usr1": signal.SIGUSR1}


def plant(fault: dict[str, Any], train: Any) -> None:
    """Change this process so that `fault` will happen in it. `train`: the module moesaic.launch.train."""
    from moesaic.parallel import trace
    from moesaic.parallel.clip import local
    from moesaic.parallel.fsdp import FSDPEngine

    kind, point = fault["kind"], fault.get("point")
    now = {"step": 0, "calls": 0, "safe": 0}
    mine = int(os.environ["RANK"]) in fault["ranks"]

    def due() -> bool:
        return mine and now["step"] == fault.get("step")

    def strike() -> None:
        os.kill(os.getpid(), SIGNALS[kind])

    train_step, predict, evaluate = train.train_step, train.predict, train.evaluate

    def counted_step(engine: Any, stream: Any, config: Any, first: int, *rest: Any) -> Any:
        now["step"], now["calls"], now["first"] = now["step"] + 1, 0, first
        if kind == "limit" and due():
            resource.setrlimit(resource.RLIMIT_FSIZE, (fault["bytes"], resource.RLIM_INFINITY))
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        loss, *others = train_step(engine, stream, config, first, *rest)
        if kind == "nan_loss" and due():
            loss = loss * torch.nan
        return [loss, *others]

    train.train_step = counted_step
    if point == "forward" or kind == "sleep":

        def struck_predict(*args: Any) -> Any:
            if due():
                strike() if kind in SIGNALS else time.sleep(1e6)
            return predict(*args)

        train.predict = struck_predict
    elif point == "evaluation":

        def struck_evaluate(*args: Any) -> Any:
            if due():
                strike()
            return evaluate(*args)

        train.evaluate = struck_evaluate
    elif point == "collective":
        call = trace.Call

        def counted_call(*args: Any) -> Any:
            now["calls"] += 1
            if due() and now["calls"] == fault["n"]:
                strike()
            return call(*args)

        trace.Call = counted_call  # type: ignore[assignment,misc]
    elif point == "save" or kind == "full":
        fsync = os.fsync

        def counted_fsync(file: int) -> None:
            now["safe"] += now["step"] > 0  # not the ones that open the run
            if mine and now["safe"] == fault["n"]:
                if kind == "full":
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                strike()
            fsync(file)

        os.fsync = counted_fsync
    elif kind == "nan":
        step = FSDPEngine.step

        def poisoned_step(self: Any, *args: Any, **kwargs: Any) -> Any:
            if due():
                gradients = [local(p.grad) for p in self.model.parameters() if p.grad is not None]
                next(g for g in gradients if g.numel()).view(-1)[0] = torch.nan
            return step(self, *args, **kwargs)

        FSDPEngine.step = poisoned_step  # type: ignore[method-assign]
    elif kind == "jump":
        agree = train.guards.agree

        def raised_loss(loss: Any, asked: bool) -> Any:
            whole, stop = agree(loss, asked)
            first = now.get("first", -1)
            return whole + 50 * (first <= fault["sample"] < first + 4 and loss.dtype != torch.float64), stop

        train.guards.agree = raised_loss
