"""How much memory one rank of a run needs, told before it needs it: nothing of the model is allocated.

In the order to read: `sketch` is the model without its numbers; `passes` runs it on tensors that have no memory, and
notes what comes and goes (`recorder`); `recordings` keeps that for one run's rows; `timeline`, `zero` and `fsdp` put
around the passes what each parallel mode adds; `modes` makes a `plan` of that, the result; `advice` says what to lower
where it does not fit.
`glibc` says what a process takes for it on a CPU; `of_run` plans a run that is built, `outlook` a config alone.

Not counted: what one operation needs while it runs, and on a GPU what its allocator cannot use.
"""
