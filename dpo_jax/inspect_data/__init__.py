"""What the model will see of an experiment's data: `facts` finds it, `terminal` and `page` show it.

Nothing is trained and no weights are read.
"""
