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

// The variants of the Services benchmark.
const (
	// Native is routed to the backend's own address: no Service, no netfilter
	// hook, no program.
	Native = "native"
	// NativeAgain is a second native bed. Its ratio to native should be 1 and
	// shows how finely this machine can measure; only measured when asked for.
	NativeAgain = "native-again"
	// Millrace and MillracePacket are what Options.Attach has under these names:
	// translated at connect(), and packet by packet at the client's veth.
	Millrace       = "millrace"
	MillracePacket = "millrace-packet"
	// IptablesNft, IptablesLegacy and Nftables are kube-proxy's rule sets.
	IptablesNft    = "iptables-nft"
	IptablesLegacy = "iptables-legacy"
	Nftables       = "nftables"
)

// DefaultVariants are those measured when none are named.
var DefaultVariants = []string{Native, Millrace, MillracePacket, IptablesNft, IptablesLegacy, Nftables}

// loaded is what bringing Services into the kernel cost, and what is there then.
type loaded struct {
	// times are those of each load, empty for native.
	times []time.Duration
	// kernelBytes and residentBytes are 0 where nobody knows.
	kernelBytes, residentBytes uint64
	// change puts the Service to in force in the place of from; nil for native.
	change func(ctx context.Context, from, to *model.Service) (time.Duration, error)
	detach func() error
	// by is the program that loaded them and its version, if there is one.
	by string
}

// loader brings Services into a bed.
type loader func(ctx context.Context, b *bed, services []*model.Service) (loaded, error)

// variant is one way to reach a backend.
type variant struct {
	name string
	// direct says that the client connects to the backends themselves.
	direct bool
	// ordered says that the rules are searched in order, so that the position
	// of the tested Service matters.
	ordered bool
	// needed says that without it there is no report.
	needed bool
	// most is the largest number of Services that is loaded without
	// Options.AllSizes, 0 for any.
	most int
	// absent says why the variant cannot be measured at all; empty if it can.
	absent string
	load   loader
}

// variantNamed finds a variant. attach are those of millrace.
func variantNamed(name string, attach map[string]Attach) (variant, error) {
	switch name {
	case Native, NativeAgain:
		return variant{name: name, direct: true, needed: name == Native, load: loadNothing}, nil
	case Millrace, MillracePacket:
		if attach[name] == nil {
			return variant{name: name, absent: "nothing was given to attach under that name (bench.Options.Attach)"}, nil
		}
		return variant{name: name, needed: true, load: loadAttached(attach[name])}, nil
	case IptablesNft, IptablesLegacy:
		tool := ruleTool{program: name + "-restore", packageName: "iptables", rules: iptablesRules, changed: iptablesChange,
			// As kube-proxy calls it, each time. With the nft backend
			// --noflush costs the square of the number of new chains.
			arguments: []string{"-w", "5", "--noflush", "--counters"}}
		if name == IptablesLegacy {
			tool.memory = legacyTables
		}
		return variant{name: name, ordered: true, most: 10_000, load: tool.load}, nil
	case Nftables:
		tool := ruleTool{program: "nft", packageName: "nftables", rules: nftablesRules, changed: nftablesChange,
			arguments: []string{"-f", "-"}}
		// 10,000 take a minute of system time: it grows with the square.
		return variant{name: name, most: 1000, load: tool.load}, nil
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
	// changed is the input for one Service of them that changed.
	changed func(services []*model.Service, from, to *model.Service) string
	// memory is what the kernel holds, where it can be asked for that.
	memory func(namespace string) (uint64, error)
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
	result.change = func(ctx context.Context, from, to *model.Service) (time.Duration, error) {
		return r.restore(ctx, b.node, path, []byte(r.changed(services, from, to)))
	}
	if r.memory != nil {
		result.kernelBytes, err = r.memory(b.node)
	}
	return result, err
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
