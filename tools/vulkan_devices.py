"""Lists Vulkan's devices with nothing but the loader; setup.sh asks it before anything is built.

One line a device: "TYPE MAJOR NAME". TYPE is discrete, integrated, virtual, software or other;
MAJOR is the driver's major version where it is Mesa's, else 0.
"""

import ctypes as c
import re
import sys

TYPES = {1: "integrated", 2: "discrete", 3: "virtual", 4: "software"}
VULKAN_1_2 = 1 << 22 | 2 << 12


class ApplicationInfo(c.Structure):
    _fields_ = [
        ("sType", c.c_int),
        ("pNext", c.c_void_p),
        ("name", c.c_char_p),
        ("version", c.c_uint32),
        ("engine", c.c_char_p),
        ("engineVersion", c.c_uint32),
        ("apiVersion", c.c_uint32),
    ]


class InstanceInfo(c.Structure):
    _fields_ = [
        ("sType", c.c_int),
        ("pNext", c.c_void_p),
        ("flags", c.c_uint32),
        ("application", c.POINTER(ApplicationInfo)),
        ("layerCount", c.c_uint32),
        ("layers", c.c_void_p),
        ("extensionCount", c.c_uint32),
        ("extensions", c.c_void_p),
    ]


class DriverProperties(c.Structure):
    _fields_ = [
        ("sType", c.c_int),
        ("pNext", c.c_void_p),
        ("id", c.c_int),
        ("name", c.c_char * 256),
        ("info", c.c_char * 256),
        ("conformance", c.c_uint8 * 4),
    ]


class Properties2(c.Structure):  # the limits at its end are not read
    _fields_ = [
        ("sType", c.c_int),
        ("pNext", c.c_void_p),
        ("apiVersion", c.c_uint32),
        ("driverVersion", c.c_uint32),
        ("vendor", c.c_uint32),
        ("device", c.c_uint32),
        ("type", c.c_int),
        ("name", c.c_char * 256),
        ("rest", c.c_uint8 * 2048),
    ]


def main() -> None:
    try:
        vk = c.CDLL("libvulkan.so.1")
    except OSError:
        sys.exit("no Vulkan loader (libvulkan.so.1)")
    instance = c.c_void_p()
    application = ApplicationInfo(sType=0, apiVersion=VULKAN_1_2)
    if (
        vk.vkCreateInstance(
            c.byref(InstanceInfo(sType=1, application=c.pointer(application))),
            None,
            c.byref(instance),
        )
        != 0
    ):
        return  # no driver at all
    count = c.c_uint32()
    vk.vkEnumeratePhysicalDevices(instance, c.byref(count), None)
    devices = (c.c_void_p * count.value)()
    vk.vkEnumeratePhysicalDevices(instance, c.byref(count), devices)
    for device in devices:
        driver = DriverProperties(sType=1000196000)
        p = Properties2(sType=1000059001, pNext=c.addressof(driver))
        vk.vkGetPhysicalDeviceProperties2(c.c_void_p(device), c.byref(p))
        mesa = re.search(rb"Mesa (\d+)", driver.info)
        print(
            TYPES.get(p.type, "other"),
            mesa[1].decode() if mesa else 0,
            p.name.decode(errors="replace"),
        )


if __name__ == "__main__":
    main()
