"""A relay for the Hub's webhooks: the bases that they name are checked at once, instead of at the next pass.

The open-source Prefect server takes no webhooks. The relay takes those of the Hub, checks their secret, and reads only
the name of a repo. A pass of the watch for this repo does the rest, so a replayed, reordered or invented payload starts
nothing that the next pass would not start.

    requant webhook --recipes deployments/recipes
"""
