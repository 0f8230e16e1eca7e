package nodedns

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/features"

	"github.com/millrace/millrace/kernel/attach"
	"github.com/millrace/millrace/kernel/bpfmap"
	"github.com/millrace/millrace/kernel/need"
	"github.com/millrace/millrace/kernel/netns"
	"github.com/millrace/millrace/layer"
)

// pinnedMaps outlive the process; the others belong to a load of the programs.
var pinnedMaps = []string{datapathMapPresences, datapathMapOutcomes, datapathMapWaiting, datapathMapDetours}

// hooks are where the programs run: first those that show the Service, for an answer must
// never show the agent.
var hooks = []struct {
	program string
	call    ebpf.AttachType
}{
	{datapathProgDnsRecvmsg4, ebpf.AttachCGroupUDP4Recvmsg},
	{datapathProgDnsRecvmsg6, ebpf.AttachCGroupUDP6Recvmsg},
	{datapathProgDnsPeername4, ebpf.AttachCgroupInet4GetPeername},
	{datapathProgDnsPeername6, ebpf.AttachCgroupInet6GetPeername},
	{datapathProgDnsConnect4, ebpf.AttachCGroupInet4Connect},
	{datapathProgDnsConnect6, ebpf.AttachCGroupInet6Connect},
	{datapathProgDnsSendmsg4, ebpf.AttachCGroupUDP4Sendmsg},
	{datapathProgDnsSendmsg6, ebpf.AttachCGroupUDP6Sendmsg},
}

// asking are the calls that are steered.
var asking = []ebpf.AttachType{ebpf.AttachCGroupInet4Connect, ebpf.AttachCGroupInet6Connect, ebpf.AttachCGroupUDP4Sendmsg, ebpf.AttachCGroupUDP6Sendmsg}

// datapath is what the layer has in the kernel. It implements host.
type datapath struct {
	settings Settings
	maps     map[string]*ebpf.Map
	programs map[string]*ebpf.Program
	attached map[ebpf.AttachType]*attach.Link
	outcomes []string
	lock     *os.File
}

// open takes over what an earlier process left, or makes it anew, and puts the programs in
// force. Over maps of another layout they have no addresses yet, and leave everything to the
// DNS Service.
func open(settings Settings) (*datapath, error) {
	const act = "open the nodedns layer"
	if err := need.Check(act, "CAP_BPF", "CAP_NET_ADMIN", "CAP_PERFMON"); err != nil {
		return nil, err
	}
	if err := os.MkdirAll(settings.Pins, 0o700); err != nil {
		return nil, fmt.Errorf("%s: make pin folder: %w", act, err)
	}
	d := &datapath{settings: settings, maps: map[string]*ebpf.Map{}, programs: map[string]*ebpf.Program{}, attached: map[ebpf.AttachType]*attach.Link{}}
	if err := d.open(); err != nil {
		d.close()
		return nil, fmt.Errorf("%s: %w", act, err)
	}
	return d, nil
}

func (d *datapath) open() (err error) {
	if d.lock, err = layer.Lock("pin folder", d.settings.Pins); err != nil {
		return err
	}
	spec, err := loadDatapath()
	if err != nil {
		return fmt.Errorf("read embedded programs: %w", err)
	}
	if d.outcomes, err = outcomeNames(spec); err != nil {
		return err
	}
	found, err := bpfmap.Adopt(d.settings.Pins, pinnedMaps, func(name string, _ *ebpf.Map) *ebpf.MapSpec { return spec.Maps[name] })
	if err != nil {
		return err
	}
	if found != nil {
		d.maps = found
	}
	if err := d.load(spec); err != nil {
		return need.Loading("load the nodedns programs", "Linux 5.15 with CONFIG_CGROUP_BPF and CONFIG_DEBUG_INFO_BTF", err)
	}
	return d.restore()
}

// load loads the programs over the maps that are there and makes the others.
func (d *datapath) load(spec *ebpf.CollectionSpec) error {
	cookie, err := netns.Cookie(d.settings.Netns)
	if err != nil {
		return err
	}
	for name, value := range map[string]any{
		datapathVarNodeCookie: cookie, datapathVarSilence: uint64(cmp.Or(d.settings.silence, mostSilence)),
		datapathVarReadsKernel: features.HaveProgramHelper(ebpf.CGroupSockAddr, asm.FnProbeReadKernel) == nil,
	} {
		if err := spec.Variables[name].Set(value); err != nil {
			return fmt.Errorf("set %s of the nodedns programs: %w", name, err)
		}
	}
	collection, err := ebpf.NewCollectionWithOptions(spec, ebpf.CollectionOptions{MapReplacements: d.maps})
	if err != nil {
		return err
	}
	defer collection.Close()
	for _, name := range append(slices.Clone(pinnedMaps), datapathMapListeners, datapathMapAskers) {
		if d.maps[name] == nil {
			d.maps[name] = collection.DetachMap(name)
		}
	}
	for name := range collection.Programs {
		d.programs[name] = collection.DetachProgram(name)
	}
	return nil
}

func (d *datapath) at(call ebpf.AttachType) attach.Cgroup {
	return attach.Cgroup{Path: d.settings.Cgroup, Attach: call}
}

func (d *datapath) pinOf(program string) string {
	return filepath.Join(d.settings.Pins, layer.LinkPrefix+program)
}

// restore implements host: maps are pinned, and each kind of call is seen by its program. A
// link that an earlier process left keeps its place among others.
func (d *datapath) restore() error {
	if err := os.MkdirAll(d.settings.Pins, 0o700); err != nil {
		return fmt.Errorf("make pin folder: %w", err)
	}
	if err := bpfmap.Pin(d.settings.Pins, pinnedMaps, d.maps); err != nil {
		return err
	}
	for _, h := range hooks {
		if err := d.putInForce(h.program, h.call); err != nil {
			return fmt.Errorf("put %s in force: %w", h.program, err)
		}
	}
	return nil
}

func (d *datapath) putInForce(program string, call ebpf.AttachType) error {
	have, err := d.attached[call], error(nil)
	if have == nil {
		have, err = d.at(call).Open(d.pinOf(program))
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if have != nil && !have.Alive() { // its cgroup is gone, or somebody detached it
		_ = have.Detach()
		have = nil
	}
	if have == nil {
		have, err = d.at(call).Link(d.programs[program], d.pinOf(program))
	} else {
		err = have.Run(d.programs[program])
	}
	if err != nil {
		return err
	}
	d.attached[call] = have
	return have.Keep()
}

// lost implements host.
func (d *datapath) lost() (gone []lost) {
	for _, name := range pinnedMaps {
		if !bpfmap.IsPinned(d.maps[name], filepath.Join(d.settings.Pins, name)) {
			gone = append(gone, lost("pin "+name))
		}
	}
	for _, h := range hooks {
		if a := d.attached[h.call]; !a.Alive() {
			gone = append(gone, lost("program "+h.program))
		} else if !a.Kept() {
			gone = append(gone, lost("pin "+layer.LinkPrefix+h.program))
		}
	}
	return gone
}

// program implements host.
func (d *datapath) program(call ebpf.AttachType) ebpf.ProgramID {
	if a := d.attached[call]; a != nil {
		return a.Program()
	}
	return 0
}

// own implements host.
func (d *datapath) own(fd uintptr) error {
	if err := d.maps[datapathMapAskers].Put(uint32(fd), uint8(1)); err != nil {
		return fmt.Errorf("mark a socket as the agent's own: %w", err)
	}
	return nil
}

// describe implements host.
func (d *datapath) describe(to *layer.Description) (err error) {
	for _, h := range hooks {
		if a := d.attached[h.call]; a.Alive() {
			to.Programs = append(to.Programs, layer.Program{Name: h.program, Hook: "cgroup/" + strings.TrimPrefix(h.program, "dns_") + " " + a.Name(), Link: a.ID()})
		}
	}
	if before := d.strangers(); len(before) > 0 {
		to.Degraded = append(to.Degraded, fmt.Sprintf("programs of others see connect() or sendmsg() first: %s; where they translate the DNS Service's address the node's own queries do not come to the agent", strings.Join(before, ", ")))
	}
	to.Reasons, err = bpfmap.Counts(d.maps[datapathMapOutcomes], d.outcomes)
	return err
}

// strangers are programs that see a call before those of this layer, by their numbers as
// bpftool-prog(8) has them.
func (d *datapath) strangers() (texts []string) {
	for _, call := range asking {
		before, err := d.at(call).Before(d.program(call))
		if err != nil {
			continue // who cannot see cannot say
		}
		for _, id := range before {
			texts = append(texts, fmt.Sprintf("program %d at %s", id, call))
		}
	}
	return texts
}

// outcomeNames are the words of `enum outcome`, in order.
func outcomeNames(spec *ebpf.CollectionSpec) ([]string, error) {
	return bpfmap.Words(spec.Types, "outcome", "OUTCOME_", int(datapathOutcomeOUTCOME_COUNT))
}

func (d *datapath) close() {
	bpfmap.CloseAll(d.maps)
	for _, a := range d.attached {
		a.Close()
	}
	for _, program := range d.programs {
		program.Close()
	}
	if d.lock != nil {
		d.lock.Close()
	}
}
