package main

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"github.com/millrace/millrace/bench"
	"github.com/millrace/millrace/layer/tune"
	"github.com/millrace/millrace/layer/tune/knob"
)

// loads are what knobs are proved with, by their settings.
var loads = map[string]bench.Load{
	"net.core.somaxconn":                 bench.BurstOfConnections,
	"net.core.rmem_default":              bench.BurstOfDatagrams,
	"net.core.rmem_max":                  bench.BurstOfDatagrams,
	"net.netfilter.nf_conntrack_max":     bench.FullTable,
	"net.ipv4.tcp_congestion_control":    bench.Connections,
	"net.ipv4.tcp_rmem":                  bench.Connections,
	"net.ipv4.tcp_wmem":                  bench.Connections,
	"net.ipv4.tcp_fin_timeout":           bench.Connections,
	"net.ipv4.tcp_max_syn_backlog":       bench.Connections,
	"net.ipv4.tcp_timestamps":            bench.Connections,
	"net.ipv4.tcp_tw_reuse":              bench.Connections,
	"net.ipv4.tcp_no_metrics_save":       bench.Connections,
	"net.ipv4.tcp_abort_on_overflow":     bench.Connections,
	"net.ipv4.tcp_early_demux":           bench.Connections,
	"net.ipv4.ip_early_demux":            bench.Connections,
	"net.ipv4.tcp_autocorking":           bench.Connections,
	"net.ipv4.tcp_limit_output_bytes":    bench.Connections,
	"net.ipv4.tcp_slow_start_after_idle": bench.Connections,
}

// proofs is the JSON form.
type proofs struct {
	Proofs []*bench.Proof `json:"proofs"`
	// Skipped are those that no load here can show.
	Skipped []string `json:"skipped,omitempty"`
}

func tuneProveCommand(s *settings) *cobra.Command {
	t := tuning{settings: s}
	c := command(&cobra.Command{
		Use:   "prove ID[=VALUE]...|--profile NAME",
		Short: "Whether a setting does anything, measured with its value and the new one",
		Long: `
Puts the value that is and the one that plan wants, or VALUE, under the same load in
network namespaces of its own, in turns, and compares: the median of the ratios with
its interval of 95 %. keeps is better by more than one percent, harmful worse (exit
status 2), no effect neither. It sets nothing of the machine's. ID may be a setting
that is called useless, with VALUE.
  millrace tune prove accept-queue=16384
  millrace tune prove tcp_fin_timeout=10`,
		Args: cobra.ArbitraryArgs,
	}, inOwnSpaces, func(ctx context.Context, args []string) error {
		if len(args) == 0 && t.profile == "" {
			return usage("say which: IDs of knobs, or --profile")
		}
		return t.prove(ctx, args)
	}, exitFindings, exitIncomplete, exitPrivilege)
	t.flagsOfChoice(c)
	t.flagRounds(c)
	return c
}

func (t *tuning) flagRounds(c *cobra.Command) {
	c.Flags().IntVar(&t.rounds, "rounds", bench.DefaultRounds, "how often both values have their turn when they are measured; 6 at least")
}

// comparison is a setting with the value that is and the one to be proved.
type comparison struct{ setting, now, wanted string }

func (t *tuning) prove(ctx context.Context, args []string) error {
	trials, skipped, err := t.trials(ctx, args)
	if err != nil {
		return err
	}
	all := proofs{Proofs: []*bench.Proof{}, Skipped: skipped}
	for _, one := range trials {
		proof, err := t.measure(ctx, one)
		if err != nil {
			return err
		}
		all.Proofs = append(all.Proofs, proof)
	}
	return all.tell(t.settings)
}

// measure puts both values under the setting's load.
func (t *tuning) measure(ctx context.Context, c comparison) (*bench.Proof, error) {
	progress := newProgress()
	defer progress.done()
	return bench.Prove(ctx, bench.ProveOptions{Load: loads[c.setting], Setting: c.setting, A: c.now, B: c.wanted, Rounds: t.rounds, Progress: progress})
}

// printProof says what was measured.
func printProof(p *bench.Proof) {
	codes := map[bench.Verdict]func(string) string{bench.Keeps: green, bench.Harmful: red, bench.NoEffect: bold}
	fmt.Println(codes[p.Verdict](string(p.Verdict)) + strings.TrimPrefix(p.String(), string(p.Verdict)) + "\n    " + string(p.Load))
}

// tell prints the proofs; one that is harmful is no success.
func (all *proofs) tell(s *settings) error {
	harmful := 0
	for _, p := range all.Proofs {
		if p.Verdict == bench.Harmful {
			harmful++
		}
		if !s.json() {
			printProof(p)
		}
	}
	for _, line := range all.Skipped {
		if !s.json() {
			fmt.Println("not proved:", line)
		}
	}
	if s.json() {
		if err := printJSON(all); err != nil {
			return err
		}
	}
	switch {
	case harmful > 0:
		return &failure{exitFindings, fmt.Errorf("%d of %d are harmful: leave them as they are", harmful, len(all.Proofs))}
	case len(all.Proofs) == 0:
		return &failure{exitIncomplete, errors.New("nothing could be proved")}
	}
	return nil
}

// trials are what is to be proved: each setting of the knobs that a load can show, and
// those that are given with a value.
func (t *tuning) trials(ctx context.Context, args []string) (trials []comparison, skipped []string, err error) {
	var ids []string
	var given [][2]string
	for _, arg := range args {
		name, value, has := strings.Cut(arg, "=")
		if !has {
			ids = append(ids, name)
			continue
		}
		setting, err := settingOf(name)
		if err != nil {
			return nil, nil, err
		}
		given = append(given, [2]string{setting, value})
	}
	for _, one := range given {
		setting, value := one[0], one[1]
		now, err := t.valueOf(setting)
		if err != nil {
			return nil, nil, err
		}
		trials = append(trials, comparison{setting, now, value})
	}
	if len(ids) == 0 && t.profile == "" {
		return trials, nil, nil
	}
	_, proposals, err := t.plan(ctx, ids)
	if err != nil {
		return nil, nil, err
	}
	for _, p := range proposals {
		switch {
		case p.Wanted == "" || p.Status == knob.Enough:
			skipped = append(skipped, p.Setting+": nothing is to be changed: "+p.Reason+"; say "+p.ID+"=VALUE to prove another")
		case loads[p.Setting] == "":
			skipped = append(skipped, p.Setting+": no load here would show what it does")
		default:
			trials = append(trials, comparison{p.Setting, p.Current, p.Wanted})
		}
	}
	return trials, skipped, nil
}

// settingOf is the setting that a person means which a load can show.
func settingOf(name string) (string, error) {
	for setting := range loads {
		if setting == name || strings.HasSuffix(setting, "."+name) {
			return setting, nil
		}
	}
	k, err := knob.Find(name)
	if err != nil {
		return "", usage("prove %s: no load here would show what it does: %v", name, err)
	}
	for _, setting := range k.Settings {
		if loads[setting] != "" {
			return setting, nil
		}
	}
	return "", usage("prove %s: no load here would show what it does", name)
}

// valueOf is what a setting is now: in the first namespace that is asked for.
func (t *tuning) valueOf(setting string) (string, error) {
	chosen, err := t.choose()
	if err != nil {
		return "", err
	}
	return tune.Value(t.at.procSys, chosen[0], setting)
}
