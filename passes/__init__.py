"""Graph to program to plan to graph.

Imports torch, torch.fx and networkx only, and runs on any machine.  ``dialect`` reads nodes of any
capture into one vocabulary, ``lift`` turns a tensor of the graph into a scalar expression over its
indices, ``find`` locates the sites, ``analyse`` separates score, mask and dead rows, ``plan``
decides, ``rewrite`` emits.
"""
