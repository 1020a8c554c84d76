"""Generation: only ids that decode, chosen as asked, as a whole or while they come.

`grammar` says which ids may come next, `sampling` picks one of them, `generation` answers with pictures, sounds and
text, `streaming` gives ids and sound while they are generated.
"""
