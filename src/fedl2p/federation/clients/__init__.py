"""The clients' side: what answers, in this process or in Ray's workers."""
