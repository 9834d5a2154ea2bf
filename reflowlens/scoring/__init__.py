"""Log-probabilities of texts: token by token, of continuations, and of the items of tasks that compare them.

    scores = rl.score(model, texts)                                   scores.texts, scores.tokens
    scores = rl.score(model, " Paris", given="The capital of France is")

`windows` says what is read at once and what of it is scored, `batches` which of them go together, `rows` how a text is
cut into tokens; `score` is what callers use, and `items` the tasks: minimal pairs, multiple choice, last words.
"""
