"""`saferlhf doctor`: is what a run needs there?"""
