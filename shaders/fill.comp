// Placeholder: writes a constant to an array.
#version 450
#extension GL_EXT_buffer_reference : require
#extension GL_EXT_scalar_block_layout : require

layout(local_size_x = 64) in;
layout(buffer_reference, scalar) writeonly buffer Floats { float at[]; };
layout(push_constant, scalar) uniform Params { Floats data; uint n; float value; } p;

void main()
{
    if (gl_GlobalInvocationID.x < p.n)
        p.data.at[gl_GlobalInvocationID.x] = p.value;
}
