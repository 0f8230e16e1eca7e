// Package portrange says which port numbers of a node are whose: those that the kernel gives to
// sockets by itself, and those that are left for who translates packets behind its back.
//
// It reads one sysctl and writes nothing.
package portrange

import (
	"fmt"
	"slices"

	"github.com/millrace/millrace/kernel/sysctl"
)

// FirstNode and LastNode are kube-apiserver's --service-node-port-range.
const FirstNode, LastNode = 30000, 32767

// firstUnprivileged is the first port that anybody may listen at.
const firstUnprivileged = 1024

// Local are the ports that the kernel gives to sockets in a namespace
// (net.ipv4.ip_local_port_range; ip(7)), the first and the last.
func Local(netns string) (low, high int, err error) {
	text, err := sysctl.Tree{Root: "/proc/sys", Netns: netns}.Read("net.ipv4.ip_local_port_range")
	if err != nil {
		return 0, 0, fmt.Errorf("find out which ports sockets are given: %w", err)
	}
	if _, err := fmt.Sscan(text, &low, &high); err != nil {
		return 0, 0, fmt.Errorf("read net.ipv4.ip_local_port_range %q: %w", text, err)
	}
	return low, high, nil
}

// Free is the largest range of ports outside low to high and the node ports; where there
// is none it is what lies between the node ports and the end.
func Free(low, high int) (first, count uint16) {
	taken := [][2]int{{0, firstUnprivileged - 1}, {low, high}, {FirstNode, LastNode}, {1 << 16, 1 << 16}}
	slices.SortFunc(taken, func(a, b [2]int) int { return a[0] - b[0] })
	free := 0
	for _, t := range taken {
		if t[0]-free > int(count) {
			first, count = uint16(free), uint16(t[0]-free)
		}
		free = max(free, t[1]+1)
	}
	if count == 0 {
		return LastNode + 1, 1<<16 - 1 - LastNode
	}
	return first, count
}
