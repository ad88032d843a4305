"""A relay for the Hub's webhooks: tells the watch which base to look at now, instead of at its next pass.

The open-source Prefect server takes no webhooks. This takes the Hub's, checks their secret, and reads one thing from
them: the name of a repo. Whether that is tracked, what its commit is and whether a run is due is found out as the watch
finds it out; so a replayed, reordered or invented payload starts nothing that the next pass would not have started.

    requant webhook --recipes deployments/recipes
"""
