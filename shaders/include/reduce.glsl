// Sums and maxima over a workgroup; every lane gets the same value. subgroupAdd adds the lanes of a
// subgroup, and the subgroups follow in ascending order, so the order depends on SG and WG alone.
#ifndef REDUCE_GLSL
#define REDUCE_GLSL

shared float reduce_parts[64];

float workgroup_sum(float x) {
    x = subgroupAdd(x);
    if (WG == SG)
        return x;
    if (subgroupElect())
        reduce_parts[gl_SubgroupID] = x;
    barrier();
    x = 0;
    for (uint i = 0; i < WG / SG; i++)
        x += reduce_parts[i];
    barrier();
    return x;
}

float workgroup_max(float x) {
    x = subgroupMax(x);
    if (WG == SG)
        return x;
    if (subgroupElect())
        reduce_parts[gl_SubgroupID] = x;
    barrier();
    x = reduce_parts[0];
    for (uint i = 1; i < WG / SG; i++)
        x = max(x, reduce_parts[i]);
    barrier();
    return x;
}
#endif
