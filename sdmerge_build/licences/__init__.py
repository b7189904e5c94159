"""Owns what licences and permissions say about a merge: terms as data, how they combine, what collides, and what must be done.

Has never heard of files, recipes or hubs; it is told who the ancestors are and which texts bind them. It never says that anybody may do anything.
"""

from sdmerge_build.licences.ancestors import Ancestor, Conflict, Duty, Layer, Reason, licence_layer, permissions_layer, unknown_layer
from sdmerge_build.licences.catalog import Licence, licence_for_base_model, licence_named, licences, nearest_licences
from sdmerge_build.licences.compose import ADVICE, POLICIES, Conclusion, conclude
from sdmerge_build.licences.permissions import ATTACHMENT_B, FLAGS, Permissions, PermissionsError, read_permissions
from sdmerge_build.licences.terms import PERMISSIVE, UNKNOWN, Cap, Terms, meet, meet_all, tightened
from sdmerge_build.licences.words import NAMES, in_words

__all__ = [
    "ADVICE",
    "ATTACHMENT_B",
    "FLAGS",
    "NAMES",
    "PERMISSIVE",
    "POLICIES",
    "UNKNOWN",
    "Ancestor",
    "Cap",
    "Conclusion",
    "Conflict",
    "Duty",
    "Layer",
    "Licence",
    "Permissions",
    "PermissionsError",
    "Reason",
    "Terms",
    "conclude",
    "in_words",
    "licence_for_base_model",
    "licence_layer",
    "licence_named",
    "licences",
    "meet",
    "meet_all",
    "nearest_licences",
    "permissions_layer",
    "read_permissions",
    "tightened",
    "unknown_layer",
]
