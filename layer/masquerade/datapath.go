package masquerade

import (
	"cmp"
	"fmt"
	"math/bits"
	"net/netip"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/millrace/millrace/kernel/bpfmap"
	"github.com/millrace/millrace/kernel/conntrack"
	"github.com/millrace/millrace/kernel/need"
	"github.com/millrace/millrace/kernel/pinned"
	"github.com/millrace/millrace/kernel/portrange"
	"github.com/millrace/millrace/layer"
	"github.com/millrace/millrace/model"
)

// pinnedMaps outlive the process.
var pinnedMaps = []string{datapathMapRanges, datapathMapWires, datapathMapFlows, datapathMapPlaces, datapathMapOutcomes, datapathMapExhausted}

// datapath is what the layer has in the kernel. It implements host.
type datapath struct {
	pinned.Folder
	settings Settings
	outcomes []string
	// firstPort and portCount are the source ports of flows; low and high what the kernel
	// gives to sockets.
	firstPort, portCount uint16
	low, high            int
	// asks says that the programs can ask what nf_conntrack tracks.
	asks bool
	lock *os.File
}

// open takes over what an earlier process left, or makes it anew.
func open(settings Settings) (*datapath, error) {
	const act = "open the masquerade layer"
	if err := need.Check(act, "CAP_BPF", "CAP_NET_ADMIN", "CAP_PERFMON"); err != nil {
		return nil, err
	}
	d := &datapath{settings: settings, Folder: pinned.Folder{Names: pinnedMaps, Points: settings.points()}}
	err := d.Make()
	if err == nil {
		err = d.open()
	}
	if err != nil {
		d.close()
		return nil, fmt.Errorf("%s: %w", act, err)
	}
	return d, nil
}

func (d *datapath) open() (err error) {
	if d.lock, err = layer.Lock("pin folder", d.settings.Pins); err != nil {
		return err
	}
	if d.low, d.high, err = portrange.Local(d.settings.Netns); err != nil {
		return err
	}
	d.firstPort, d.portCount = portrange.Free(d.low, d.high)
	if err := d.adopt(); err != nil {
		return err
	}
	d.asks = conntrack.IsLoaded()
	if err = d.load(); err != nil && d.asks {
		d.asks = false // it is a module, and its functions are not for us
		err = d.load()
	}
	if err != nil {
		return need.Loading("load the masquerade programs", "Linux 5.15 with CONFIG_BPF_SYSCALL", err)
	}
	atOnce, err := d.TakeOver()
	if err != nil || !atOnce {
		return err
	}
	return d.Settle()
}

// specOf are the programs and maps for these settings.
func (s Settings) specOf() (*ebpf.CollectionSpec, error) {
	spec, err := loadDatapath()
	if err != nil {
		return nil, fmt.Errorf("read embedded programs: %w", err)
	}
	// a flow has two entries, and is there before the one that it takes the place of has gone
	const slack = 1024
	spec.Maps[datapathMapFlows].MaxEntries = uint32(2*s.flows() + slack)
	spec.Maps[datapathMapPlaces].MaxEntries = uint32(s.flows())
	return spec, nil
}

// adopt opens the maps that an earlier process left, if they are of the same layout and
// size.
func (d *datapath) adopt() error {
	spec, err := d.settings.specOf()
	if err != nil {
		return err
	}
	_, err = d.Adopt(func(name string, _ *ebpf.Map) *ebpf.MapSpec { return spec.Maps[name] })
	return err
}

// load loads the programs over the maps that are there and makes the others.
func (d *datapath) load() error {
	spec, err := d.settings.specOf()
	if err != nil {
		return err
	}
	if d.outcomes, err = outcomeNames(spec); err != nil {
		return err
	}
	for name, value := range map[string]any{
		datapathVarFirstPort: d.firstPort, datapathVarPortCount: d.portCount,
		datapathVarPlacesMask: uint32(d.settings.flows() - 1), datapathVarAsksConntrack: d.asks,
	} {
		if err := spec.Variables[name].Set(value); err != nil {
			return fmt.Errorf("set %s of the masquerade programs: %w", name, err)
		}
	}
	if !d.asks {
		conntrack.AskNobody(spec)
	}
	_, err = d.Load(spec)
	return err
}

// sameLayout says whether maps are as this version's.
func sameLayout(opened map[string]*ebpf.Map) error {
	spec, err := loadDatapath()
	if err != nil {
		return err
	}
	return bpfmap.SameLayout(opened, spec.Maps)
}

// settle implements host.
func (d *datapath) settle() error { return d.Settle() }

// lost implements host.
func (d *datapath) lost() (gone []lost) {
	for _, pin := range d.Lost() {
		gone = append(gone, lost(pin))
	}
	return gone
}

// restore implements host.
func (d *datapath) restore() error { return d.Restore() }

// sweepPlaces is how many places masq_sweep looks at in one run (SWEEP_PLACES).
const sweepPlaces = 256

// sweep implements host.
func (d *datapath) sweep() (alive int, err error) {
	frame := make([]byte, 64)
	for first := 0; first < d.settings.flows(); first += sweepPlaces {
		frame[0], frame[1], frame[2], frame[3] = byte(first), byte(first>>8), byte(first>>16), byte(first>>24)
		found, err := d.Programs[datapathProgMasqSweep].Run(&ebpf.RunOptions{Data: frame})
		if err != nil {
			return 0, fmt.Errorf("sweep flows: %w", err)
		}
		alive += int(found)
	}
	return alive, nil
}

// describe implements host.
func (d *datapath) describe(to *layer.Description) error {
	to.Settings = map[string]string{"ports": fmt.Sprintf("%d-%d", d.firstPort, int(d.firstPort)+int(d.portCount)-1)}
	if !d.Points.TCX {
		to.Degraded = append(to.Degraded, "packets are seen by clsact filters: tcx needs Linux 6.6")
	}
	if d.portCount < 1024 || int(d.firstPort) <= d.high && int(d.firstPort)+int(d.portCount) > d.low {
		to.Degraded = append(to.Degraded, fmt.Sprintf("pods have %d source ports towards each destination, from %d on, beside those of the node's own sockets: net.ipv4.ip_local_port_range is %d %d",
			d.portCount, d.firstPort, d.low, d.high))
	}
	for i := range to.Maps {
		to.Maps[i].Bytes = bpfmap.Bytes(d.Maps[datapathMapFlows]) + bpfmap.Bytes(d.Maps[datapathMapPlaces])
	}
	to.Programs = append(to.Programs, layer.ProgramsAt(&d.Points)...)
	exhausted, err := d.exhausted()
	to.Degraded = append(to.Degraded, exhausted...)
	if err != nil {
		return err
	}
	to.Reasons, err = bpfmap.Counts(d.Maps[datapathMapOutcomes], d.outcomes)
	return err
}

// shown is how many destinations without a free port are named.
const shown = 5

// exhaustedFor is how long a destination is named towards which no port was found.
const exhaustedFor = time.Hour

// exhausted says towards whom no port was found within the last hour, the most frequent
// first.
func (d *datapath) exhausted() (texts []string, err error) {
	found, err := bpfmap.New[datapathDestination, datapathExhaustion](d.Maps[datapathMapExhausted]).All()
	if err != nil {
		return nil, err
	}
	var now unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &now); err != nil {
		return nil, fmt.Errorf("read the clock: %w", err)
	}
	age := func(to datapathDestination) time.Duration { // in 32 bits, as it is noted
		return time.Duration(uint32(now.Sec)-found[to].Last) * time.Second
	}
	all := make([]datapathDestination, 0, len(found))
	for to := range found {
		if age(to) <= exhaustedFor {
			all = append(all, to)
		}
	}
	slices.SortFunc(all, func(a, b datapathDestination) int {
		return cmp.Or(cmp.Compare(found[b].Count, found[a].Count), strings.Compare(a.text(), b.text()))
	})
	for i, to := range all {
		if i == shown {
			texts = append(texts, fmt.Sprintf("no source port was found towards %d destinations more", len(all)-shown))
			break
		}
		texts = append(texts, fmt.Sprintf("no source port was found %d times, last %s ago, towards %s: pods of this node have used nearly all %d at once; "+
			"let them keep their connections open and share them, spread the pods over more nodes, or let them keep their addresses there (nonMasqueradeCIDRs)", found[to].Count, age(to), to.text(), d.portCount))
	}
	return texts, nil
}

// text is "192.0.2.7:443/tcp"; of pings it is the address.
func (t datapathDestination) text() string {
	addr, protocol := fromAddress(t.Address), model.Protocol(t.Protocol)
	if protocol != model.TCP && protocol != model.UDP {
		return addr.String() + " by pings"
	}
	return netip.AddrPortFrom(addr, bits.ReverseBytes16(t.Port)).String() + "/" + protocol.String()
}

// outcomeNames are the words of `enum outcome`, in order.
func outcomeNames(spec *ebpf.CollectionSpec) ([]string, error) {
	return bpfmap.Words(spec.Types, "outcome", "OUTCOME_", int(datapathOutcomeOUTCOME_COUNT))
}

func (d *datapath) close() {
	d.Close()
	if d.lock != nil {
		d.lock.Close()
	}
}
