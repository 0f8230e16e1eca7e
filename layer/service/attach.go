package service

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strconv"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/millrace/millrace/kernel/attach"
)

// hook is a place where a program runs.
type hook struct {
	// name is that of its attachment and pin: "connect4", "from_pod_12".
	name    string
	program string
	attach  ebpf.AttachType
	// device is the index of a pod's veth, 0 for the cgroup.
	device int
}

// cgroupHooks are where the programs of connect.bpf.c run: first those that show the
// Service, since an answer to a socket that was steered must never show its endpoint.
var cgroupHooks = []hook{
	{datapathProgRecvmsg4, datapathProgRecvmsg4, ebpf.AttachCGroupUDP4Recvmsg, 0},
	{datapathProgRecvmsg6, datapathProgRecvmsg6, ebpf.AttachCGroupUDP6Recvmsg, 0},
	{datapathProgGetpeername4, datapathProgGetpeername4, ebpf.AttachCgroupInet4GetPeername, 0},
	{datapathProgGetpeername6, datapathProgGetpeername6, ebpf.AttachCgroupInet6GetPeername, 0},
	{datapathProgConnect4, datapathProgConnect4, ebpf.AttachCGroupInet4Connect, 0},
	{datapathProgConnect6, datapathProgConnect6, ebpf.AttachCGroupInet6Connect, 0},
	{datapathProgSendmsg4, datapathProgSendmsg4, ebpf.AttachCGroupUDP4Sendmsg, 0},
	{datapathProgSendmsg6, datapathProgSendmsg6, ebpf.AttachCGroupUDP6Sendmsg, 0},
}

// packetPort is a device at which the packet path is to be in force.
type packetPort struct {
	name string
	side side
}

// side is what lies behind a port.
type side int

const (
	ofPod    side = iota
	ofWire        // other machines
	ofWireL3      // likewise, and its packets have no Ethernet headers
)

var sides = []side{ofPod, ofWire, ofWireL3}

// programs are those at a port: first the one that sees what goes out, since a
// translated packet must never be answered without it.
func (s side) programs() [2]string {
	switch s {
	case ofWire:
		return [2]string{datapathProgToWire, datapathProgFromWire}
	case ofWireL3:
		return [2]string{datapathProgToWireL3, datapathProgFromWireL3}
	}
	return [2]string{datapathProgToPod, datapathProgFromPod}
}

// bareWires are the programs of wires without Ethernet headers.
var bareWires = ofWireL3.programs()

// portHooks are where the programs of packet.bpf.c run at one port.
func portHooks(device int, s side) []hook {
	programs := s.programs()
	return []hook{
		{fmt.Sprintf("%s_%d", programs[0], device), programs[0], ebpf.AttachTCXEgress, device},
		{fmt.Sprintf("%s_%d", programs[1], device), programs[1], ebpf.AttachTCXIngress, device},
	}
}

// portOfHook reads the device from the name of a port's hook.
func portOfHook(name string) (device int, s side, ok bool) {
	for _, s := range sides {
		for _, program := range s.programs() {
			rest, found := strings.CutPrefix(name, program+"_")
			if device, err := strconv.Atoi(rest); found && err == nil && device > 0 {
				return device, s, true
			}
		}
	}
	return 0, ofPod, false
}

// hooks are all places where programs of this layer are to run now.
func (d *datapath) hooks() []hook {
	all := slices.Clone(cgroupHooks)
	for device, port := range d.ports {
		all = append(all, portHooks(device, port.side)...)
	}
	slices.SortStableFunc(all[len(cgroupHooks):], func(a, b hook) int { return a.device - b.device })
	return all
}

// linked is an attachment that is a link of the kernel, of a device or a cgroup. Whatever
// is pinned at its pin is taken for its own, for there is one writer: to look is cheaper
// than to open, and there are two of these for each pod. Without a pin nothing is kept.
type linked struct{ *attach.Link }

// Kept implements attach.Attachment.
func (l linked) Kept() bool {
	if l.Pin == "" {
		return true
	}
	_, err := os.Stat(l.Pin)
	return err == nil
}

// Keep implements attach.Attachment.
func (l linked) Keep() error {
	if l.Kept() {
		return nil
	}
	return l.Link.Keep()
}

// pinOf is the path of a hook's pin; "" where nothing is pinned.
func (d *datapath) pinOf(h hook) string {
	if d.settings.Pins == "" {
		return ""
	}
	return d.pin(linkPrefix + h.name)
}

// at is a hook of a device.
func (d *datapath) at(h hook) attach.Hook {
	return attach.Hook{Netns: d.settings.Netns, Device: h.device, Name: cmp.Or(d.ports[h.device].name, fmt.Sprintf("device %d", h.device)), Attach: h.attach}
}

// ofCgroup is a hook of the cgroup.
func (d *datapath) ofCgroup(h hook) attach.Cgroup {
	return attach.Cgroup{Path: d.settings.Cgroup, Attach: h.attach}
}

// place says how a link of this hook is recognized: by the cgroup, or by the device.
func (d *datapath) place(h hook) func(*link.Info) bool {
	if h.device > 0 {
		return d.at(h).Place
	}
	return d.ofCgroup(h).Place
}

// inPlace says that a hook's program sees a call behind the one that has to see it first
// (Settings.Behind). Where it does not it is attached anew, and taken away from its place
// then: for that moment a call is seen twice, and getpeername() shows the endpoint of a
// connection that is made then.
func (d *datapath) inPlace(h hook) bool {
	if h.device > 0 || d.settings.Behind == nil {
		return true
	}
	first, own := d.settings.Behind(h.attach), linkOf(d.attached[h.name])
	if first == 0 || own == nil {
		return true
	}
	before, err := d.ofCgroup(h).Before(first)
	return err != nil || !slices.Contains(before, own.Program()) // who cannot see cannot mend
}

// linkOf is the link of the kernel that an attachment is, nil if it is none.
func linkOf(a attach.Attachment) *attach.Link {
	if l, ok := a.(linked); ok {
		return l.Link
	}
	return nil
}

// attach makes a hook run a program: by switching the attachment that is there,
// else by a new one.
func (d *datapath) attach(h hook, program *ebpf.Program) error {
	have := d.attached[h.name]
	if have != nil && !have.Alive() {
		// Its cgroup or device is gone, or somebody detached it.
		_ = have.Detach()
		delete(d.attached, h.name)
		have = nil
	}
	if have != nil && d.inPlace(h) {
		if err := have.Run(program); err != nil {
			return fmt.Errorf("switch %s to the new program: %w", h.name, err)
		}
		return have.Keep()
	}
	made, err := d.makeAttachment(h, program)
	if err != nil {
		return err
	}
	d.attached[h.name] = made
	if have != nil {
		return errors.Join(linkOf(made).Keep(), have.Detach())
	}
	return made.Keep()
}

// wentAway says that attaching failed because the device is gone, as pods go at any
// moment.
func (h hook) wentAway(err error) bool {
	return h.device > 0 && (errors.Is(err, unix.ENODEV) || errors.Is(err, unix.ENOLINK))
}

// attachIfThere is attach, and forgets a device that is gone.
func (d *datapath) attachIfThere(h hook, program *ebpf.Program) error {
	err := d.attach(h, program)
	if h.wentAway(err) {
		return d.detachPort(h.device)
	}
	return err
}

// makeAttachment attaches a program to a hook that has none.
func (d *datapath) makeAttachment(h hook, program *ebpf.Program) (attach.Attachment, error) {
	// Before other programs: they are to see what the host's stack sees.
	return d.makeAt(h, program, d.pinOf(h), link.Head(), filterPriority)
}

// makeAt attaches a program at a place among those of its hook: anchor where
// there is tcx, priority where there are filters; on a cgroup it is the last.
func (d *datapath) makeAt(h hook, program *ebpf.Program, pin string, anchor link.Anchor, priority attach.Order) (attach.Attachment, error) {
	if h.device == 0 {
		made, err := d.ofCgroup(h).Link(program, pin)
		if err != nil {
			return nil, fmt.Errorf("attach %s: %w", h.name, err)
		}
		return linked{made}, nil
	}
	if !d.tcx {
		return d.makeFilter(h, program, priority)
	}
	made, err := d.at(h).TCX(program, anchor, pin)
	if err != nil {
		return nil, fmt.Errorf("attach %s to device %s: %w", h.program, d.ports[h.device].name, err)
	}
	return linked{made}, nil
}

// openAttachments opens what an earlier process has in force. Links of devices
// that are gone are cleared away.
func (d *datapath) openAttachments() error {
	if d.settings.Pins == "" {
		return nil
	}
	for _, h := range cgroupHooks {
		if err := d.openPinned(h); err != nil {
			return err
		}
	}
	found, err := os.ReadDir(d.settings.Pins)
	if err != nil {
		return fmt.Errorf("read pin folder: %w", err)
	}
	for _, entry := range found {
		device, side, ok := portOfHook(strings.TrimPrefix(entry.Name(), linkPrefix))
		if !ok {
			continue
		}
		d.ports[device] = packetPort{fmt.Sprintf("device %d", device), side}
		for _, h := range portHooks(device, side) {
			if err := d.openPinned(h); err != nil {
				return err
			}
		}
		d.dropDeadPort(device)
	}
	if !d.tcx {
		return d.openFilters()
	}
	return nil
}

// dropDeadPort forgets a device that is gone.
func (d *datapath) dropDeadPort(device int) {
	for _, h := range portHooks(device, d.ports[device].side) {
		if have := d.attached[h.name]; have != nil && have.Alive() {
			return
		}
	}
	_ = d.detachPort(device)
}

func (d *datapath) openPinned(h hook) error {
	pinned, err := attach.Open(d.pinOf(h), h.name, d.place(h))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	d.attached[h.name] = linked{pinned}
	return nil
}

// attachPort puts the packet path in force at a device. Where programs wait to be
// put in force, it is put in force with them.
func (d *datapath) attachPort(device int, p packetPort) error {
	if have, there := d.ports[device]; there && have.side != p.side {
		if err := d.detachPort(device); err != nil {
			return err
		}
	}
	if err := d.makeFlows(); err != nil {
		return err
	}
	if p.side == ofWireL3 {
		if err := d.loadBare(); err != nil {
			return err
		}
	}
	d.ports[device] = p
	if d.programs == nil {
		return nil
	}
	for _, h := range portHooks(device, p.side) {
		if err := d.attachIfThere(h, d.programs[h.program]); err != nil {
			return errors.Join(err, d.detachPort(device))
		}
	}
	return nil
}

// detachPortAs is detachPort, if the device still is what it was: one that turned from
// a pod's to a wire, or back, has the programs of the other by now.
func (d *datapath) detachPortAs(device int, wire bool) error {
	if port, there := d.ports[device]; there && (port.side != ofPod) != wire {
		return nil
	}
	return d.detachPort(device)
}

// detachPort takes the packet path away from a device, what sees packets come in
// first.
func (d *datapath) detachPort(device int) error {
	hooks := portHooks(device, d.ports[device].side)
	delete(d.ports, device)
	var failures []error
	for _, h := range slices.Backward(hooks) {
		if have := d.attached[h.name]; have != nil {
			failures = append(failures, have.Detach())
			delete(d.attached, h.name)
		}
	}
	return errors.Join(failures...)
}

// lost lists the programs and pins that should be there and are not.
func (d *datapath) lost() []lost {
	if d.waiting != nil {
		return nil
	}
	var gone []lost
	for _, h := range d.hooks() {
		have := d.attached[h.name]
		if have == nil || !have.Alive() {
			gone = append(gone, lost("program "+h.name))
		} else if !d.inPlace(h) {
			gone = append(gone, lost("place of program "+h.name))
		} else if !have.Kept() {
			gone = append(gone, lost("pin "+linkPrefix+h.name))
		}
	}
	return append(gone, d.lostPins()...)
}
