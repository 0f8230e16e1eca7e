package layertest

import (
	"errors"
	"fmt"
	"slices"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	bpflink "github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/millrace/millrace/kernel/attach"
	"github.com/millrace/millrace/kernel/netns"
)

// WithoutTCX has a layer find what it finds before Linux 6.6 until the test ends; have is
// the layer's own question.
func WithoutTCX(t testing.TB, have *func() bool) {
	asked := *have
	*have = func() bool { return false }
	t.Cleanup(func() { *have = asked })
}

// Passing is a program for devices that passes all on.
func Passing(t testing.TB, name string) *ebpf.Program {
	t.Helper()
	program, err := ebpf.NewProgram(&ebpf.ProgramSpec{Name: name, Type: ebpf.SchedCLS, License: "MIT",
		Instructions: asm.Instructions{asm.LoadImm(asm.R0, -1, asm.DWord), asm.Return()}})
	must(t, err)
	t.Cleanup(func() { program.Close() })
	return program
}

// StrangeFilter puts a program of somebody else's at a device as a filter, and returns a
// function that says whether it is still there; parent is HANDLE_MIN_INGRESS or
// HANDLE_MIN_EGRESS of netlink.
func StrangeFilter(t testing.TB, namespace string, device int, parent uint32, program *ebpf.Program) (unharmed func() error) {
	t.Helper()
	attrs := netlink.FilterAttrs{LinkIndex: device, Parent: parent, Priority: 1, Handle: 1, Protocol: unix.ETH_P_ALL}
	must(t, netns.Do(namespace, func() error {
		return errors.Join(netlink.QdiscAdd(attach.Clsact(device)),
			netlink.FilterAdd(&netlink.BpfFilter{FilterAttrs: attrs, Fd: program.FD(), Name: "stranger", DirectAction: true}))
	}))
	return func() error {
		return netns.Do(namespace, func() error {
			filters, err := netlink.FilterList(&netlink.Device{LinkAttrs: netlink.LinkAttrs{Index: device}}, parent)
			if err != nil || !slices.ContainsFunc(filters, func(f netlink.Filter) bool { return f.Attrs().Priority == 1 }) {
				return fmt.Errorf("the filter is gone: %v, %w", filters, err)
			}
			return nil
		})
	}
}

// Devices are those of a namespace, each with how many programs and which queues it has.
func Devices(t testing.TB, namespace string) (lines []string) {
	t.Helper()
	must(t, netns.Do(namespace, func() error {
		links, err := netlink.LinkList()
		for _, l := range links {
			lines = append(lines, "device "+l.Attrs().Name)
			for _, side := range []ebpf.AttachType{ebpf.AttachTCXIngress, ebpf.AttachTCXEgress} {
				if found, err := bpflink.QueryPrograms(bpflink.QueryOptions{Target: l.Attrs().Index, Attach: side}); err == nil {
					lines = append(lines, fmt.Sprintf("%d programs of %s", len(found.Programs), side))
				}
			}
			qdiscs, wrong := netlink.QdiscList(l)
			for _, q := range qdiscs {
				lines = append(lines, "qdisc "+q.Type())
			}
			err = errors.Join(err, wrong)
		}
		return err
	}))
	return lines
}
