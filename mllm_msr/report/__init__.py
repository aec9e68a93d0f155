"""The report of a run as one HTML file: data, results, training, scores, studies and stories.

``page.py`` puts it together from the sections, one module each. The file needs no other: images are
data URIs, charts inline SVG, and a Content-Security-Policy forbids scripts and every request.
"""
