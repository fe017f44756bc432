"""How good answers are: against labels (accuracy, error), or without labels against the source's answers (agreement).

``judge`` takes the answers of a model one sample at a time and gives one score, by a metric of ``metrics`` or of
``user_metric`` where there are labels, else by one of ``agreement``. What ``score`` keeps are a few figures of each
sample and no answers; ``intervals`` says how far they can be trusted, ``loss`` compares two scores, and
``histogram`` and ``cosine`` are how far each output is off altogether.

Samples lie along the first axis of outputs and labels. Answers that are no numbers (NaN) are wrong answers.
"""
