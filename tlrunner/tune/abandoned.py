"""Reservations that Ray keeps for the dead."""

import ray
from ray import ActorID, PlacementGroupID
from ray._private.state import state as ray_state
from ray.core.generated.gcs_pb2 import PlacementGroupTableData
from ray.util import remove_placement_group
from ray.util.placement_group import PlacementGroup


def free_abandoned() -> int:
    """Remove the placement groups of this job whose makers have died; gives how many.

    Ray itself keeps what an actor reserved until its whole job ends. Ray Train has a cleaner, which
    learns of a reservation when it is granted: where a controller was killed while it waited for
    room, its group would be granted that room later, and hold it for nobody.
    """
    # Not public: `placement_group_table` does not say who made a group.
    accessor = ray_state._connect_and_get_accessor()
    job = ray.get_runtime_context().get_job_id()
    freed = 0
    for entry in accessor.get_placement_group_table():
        group = PlacementGroupTableData.FromString(entry)
        is_of_an_actor = not ActorID(group.creator_actor_id).is_nil()
        is_kept = group.state != PlacementGroupTableData.REMOVED
        is_ours = group.creator_job_id.hex() == job and not group.is_detached
        if is_ours and is_kept and is_of_an_actor and group.creator_actor_dead:
            remove_placement_group(PlacementGroup(PlacementGroupID(group.placement_group_id)))
            freed += 1
    return freed
