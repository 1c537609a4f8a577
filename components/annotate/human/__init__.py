"""Annotation by people: a batch of blind items goes out, labels come back, and a majority decides.

questions.py       what people are asked, and the guidelines
batch.py           pairs and gold items -> the items of a batch, in blind order
formats.py         the files that Label Studio and Argilla import
label_parsing.py   one row of a file that comes back -> labels, or why it is refused
label_import.py    files -> labels, all or none
batch_store.py     where batch, labels and results lie in the store
agreement.py       how far annotators agree
annotators.py      who labels carelessly
majority.py        votes -> verdicts -> preferences
results.py         all figures of a batch, and their table
waiting.py         what the stage `annotate` does while labels are awaited
"""
