package bench

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os/exec"
	"strings"
	"time"

	"github.com/millrace/millrace/kernel/netns"
	"github.com/millrace/millrace/model"
)

// The variants of the connection benchmark.
const (
	// Native is routed to the backend's own address: no Service, no netfilter
	// hook, no program.
	Native = "native"
	// NativeAgain is a second native bed. Its ratio to native should be 1 and
	// shows how finely this machine can measure; only measured when asked for.
	NativeAgain = "native-again"
	// Millrace is what Options.Millrace attaches.
	Millrace = "millrace"
	// IptablesNft, IptablesLegacy and Nftables are kube-proxy's rule sets.
	IptablesNft    = "iptables-nft"
	IptablesLegacy = "iptables-legacy"
	Nftables       = "nftables"
)

// DefaultVariants are those measured when none are named.
var DefaultVariants = []string{Native, Millrace, IptablesNft, IptablesLegacy, Nftables}

// AttachSpec is what the variant under test works with.
type AttachSpec struct {
	// NetNS is the path of the node's network namespace.
	NetNS string
	// Cgroup is the cgroup2 folder of the client, and of no other process.
	Cgroup string
	// Services are all to be loaded, before Attach returns.
	Services []*model.Service
}

// Attached is the variant under test, at work.
type Attached struct {
	// LoadTime is from nothing to every Service answering: loading and attaching
	// the programs included.
	LoadTime time.Duration
	// MapBytes is the memory of the maps, 0 if it is not known.
	MapBytes uint64
	// Close takes everything away again.
	Close func() error
}

// Attach loads the Services and attaches the programs. An error leaves nothing,
// and ends the run.
type Attach func(AttachSpec) (Attached, error)

// loaded is what bringing Services into the kernel cost.
type loaded struct {
	// times are those of each load, empty for native.
	times    []time.Duration
	mapBytes uint64
	detach   func() error
	// by is the program that loaded them and its version, if there is one.
	by string
}

// loader brings Services into a bed. services is empty for native.
type loader func(ctx context.Context, b *bed, services []*model.Service) (loaded, error)

// variant is one way to reach a backend.
type variant struct {
	name string
	// direct says that the client connects to the backends themselves.
	direct bool
	// ordered says that the rules are searched in order, so that the position
	// of the tested Service matters.
	ordered bool
	load    loader
}

// variantNamed finds a variant. attach is that of millrace and may be nil.
func variantNamed(name string, attach Attach) (variant, error) {
	switch name {
	case Native, NativeAgain:
		return variant{name: name, direct: true, load: loadNothing}, nil
	case Millrace:
		return variant{name: name, load: loadAttached(attach)}, nil
	case IptablesNft, IptablesLegacy:
		tool := ruleTool{program: name + "-restore", packageName: "iptables", rules: iptablesRules,
			// As kube-proxy calls it, each time. With the nft backend
			// --noflush costs the square of the number of new chains.
			arguments: []string{"-w", "5", "--noflush", "--counters"}}
		return variant{name: name, ordered: true, load: tool.load}, nil
	case Nftables:
		tool := ruleTool{program: "nft", packageName: "nftables", rules: nftablesRules, arguments: []string{"-f", "-"}}
		return variant{name: name, load: tool.load}, nil
	}
	return variant{}, fmt.Errorf("unknown variant %q: use %s", name, strings.Join(append(DefaultVariants, NativeAgain), ", "))
}

func loadNothing(context.Context, *bed, []*model.Service) (loaded, error) { return loaded{}, nil }

// A load is repeated for a better figure, at most this often and only while all
// loads together took less than the time.
const (
	maxLoads = 3
	loadTime = 1500 * time.Millisecond
)

// loadAttached is the loader of the variant under test.
func loadAttached(attach Attach) loader {
	return func(_ context.Context, b *bed, services []*model.Service) (loaded, error) {
		var result loaded
		if attach == nil {
			return result, errors.New("nothing was given to attach (bench.Options.Millrace)")
		}
		spec := AttachSpec{NetNS: b.node, Cgroup: b.clientGroup, Services: services}
		for {
			attached, err := attach(spec)
			if err != nil {
				return result, err
			}
			result.times = append(result.times, attached.LoadTime)
			result.mapBytes, result.detach = attached.MapBytes, attached.Close
			if !again(result.times) {
				return result, nil
			}
			if err := attached.Close(); err != nil {
				return result, err
			}
		}
	}
}

// again says whether one more load pays.
func again(times []time.Duration) bool {
	var sum time.Duration
	for _, t := range times {
		sum += t
	}
	return len(times) < maxLoads && sum < loadTime
}

// ruleTool loads a rule set by the program that kube-proxy runs for it.
type ruleTool struct {
	program, packageName string
	arguments            []string
	rules                func([]*model.Service) string
}

// load fills the bed's node, and namespaces that are thrown away before it, for
// a load onto rules that exist would be another task.
func (r ruleTool) load(ctx context.Context, b *bed, services []*model.Service) (loaded, error) {
	var result loaded
	path, err := exec.LookPath(r.program)
	if err != nil {
		return result, fmt.Errorf("%s is not installed: apt-get install %s", r.program, r.packageName)
	}
	rules := []byte(r.rules(services))
	first, err := r.restore(ctx, b.node, path, rules)
	if err != nil {
		return result, err
	}
	result.times, result.by = append(result.times, first), r.version(ctx, path)
	for again(result.times) {
		took, err := r.practise(ctx, b.node+"-again", path, rules)
		if err != nil {
			return result, err
		}
		result.times = append(result.times, took)
	}
	return result, nil
}

// practise loads the rules into a namespace of their own.
func (r ruleTool) practise(ctx context.Context, namespace, path string, rules []byte) (time.Duration, error) {
	if err := netns.Create(namespace); err != nil {
		return 0, err
	}
	took, err := r.restore(ctx, namespace, path, rules)
	return took, errors.Join(err, netns.Remove(namespace))
}

// restore runs the program once. The time is that of the whole process.
func (r ruleTool) restore(ctx context.Context, namespace, path string, rules []byte) (time.Duration, error) {
	command := exec.CommandContext(ctx, path, r.arguments...)
	var said bytes.Buffer
	command.Stdin, command.Stdout, command.Stderr = bytes.NewReader(rules), &said, &said
	var took time.Duration
	err := netns.Do(namespace, func() error {
		start := time.Now()
		defer func() { took = time.Since(start) }()
		return command.Run()
	})
	if err != nil {
		return 0, fmt.Errorf("%s: %w: %s", r.program, err, firstLine(said.String()))
	}
	return took, nil
}

// version is what the program says of itself, for the header.
func (r ruleTool) version(ctx context.Context, path string) string {
	out, err := exec.CommandContext(ctx, path, "--version").Output()
	if err != nil {
		return "unknown"
	}
	return firstLine(string(out))
}

func firstLine(text string) string {
	for line := range strings.Lines(text) {
		if line = strings.TrimSpace(line); line != "" && !strings.HasSuffix(line, "(nf_tables):") {
			return line
		}
	}
	return "no message"
}
