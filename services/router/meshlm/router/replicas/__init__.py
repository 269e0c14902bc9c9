"""The workers: heard, compared, chosen among, given no more than they can do, and found out where they are wrong."""
