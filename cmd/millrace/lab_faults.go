package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/millrace/millrace/lab/fault"
	"github.com/millrace/millrace/layer/trace/cause"
)

// faultWord is the hidden sub-command of a process that one of the faults needs.
const faultWord = "lab-fault"

// faultWish is what `lab faults` was asked for.
type faultWish struct {
	window time.Duration
	rounds int
}

func labFaultsCommand(s *settings) *cobra.Command {
	var w faultWish
	c := command(&cobra.Command{
		Use:   "faults [NAME...]",
		Short: "Break small networks on purpose, and see whether trace names the cause",
		Long: `
Without a name it lists the faults. With names it makes a network of namespaces for
each, induces the fault, sends traffic, lets millrace trace look, and shows what it
says. NAME is a fault's, or its number; NAME/6 is the fault by IPv6. Many at once:
  listed        those that were measured, as they were
  variants      others, and all by IPv6 that can be
  random        --rounds of them with everything drawn at random, some two at a time;
                random:SEED draws the same again, random:SEED:N only the Nth
  controls      healthy runs, in which nothing may be named
  all           listed, variants, random and controls
A run is right if exactly what was induced is named, in the namespace where it is.
Beside it: what the kernel's reasons for drops say by themselves, and counters by
themselves. MILLRACE_TRACE_EVIDENCE=FOLDER keeps what was seen in each run.`,
		Args: cobra.ArbitraryArgs,
	}, inOwnSpaces, func(ctx context.Context, args []string) error {
		return w.run(ctx, s, args)
	}, exitFindings, exitUnavailable, exitPrivilege)
	flagFor(c, &w.window, 3*time.Second, "how long to watch each run; faults that take longer to show get more")
	c.Flags().IntVar(&w.rounds, "rounds", 100, "how many runs are drawn at random")
	return c
}

// labFaultCommand is a client in a process of its own.
func labFaultCommand() *cobra.Command {
	return command(&cobra.Command{Use: faultWord, Hidden: true, Short: "A client that a fault of the lab needs", Args: cobra.ArbitraryArgs, DisableFlagParsing: true},
		inOwnSpaces, func(_ context.Context, args []string) error {
			if status := fault.WorkerMain(args); status != 0 {
				return &failure{status, errors.New("")}
			}
			return nil
		})
}

// atOnce is how many runs are made side by side: most of each is waiting.
const atOnce = 4

func (w *faultWish) run(ctx context.Context, s *settings, args []string) error {
	if w.window <= 0 || w.window > time.Minute || w.rounds < 1 {
		return usage("--for and --rounds: use up to 1m, and 1 or more")
	}
	if len(args) == 0 {
		return listFaults(s)
	}
	cases, err := w.cases(args)
	if err != nil {
		return err
	}
	self, err := os.Executable()
	if err == nil {
		err = fault.Sweep()
	}
	if err != nil {
		return err
	}
	folder := os.Getenv(evidenceVariable)
	if folder == "" {
		if folder, err = os.MkdirTemp("", "millrace-faults-"); err != nil {
			return err
		}
		defer os.RemoveAll(folder)
	}
	t := &faultTracer{self: self, folder: folder}
	var results []*fault.Result
	fault.RunAll(ctx, cases, atOnce, []string{self, faultWord}, w.window, t.trace, func(r *fault.Result) {
		results = append(results, r)
		if !s.json() {
			printRun(r, len(args) == 1 && len(cases) == 1)
		}
	})
	totals := fault.Totals(results)
	if s.json() {
		err = printJSON(struct {
			Runs   []*fault.Result `json:"runs"`
			Totals []fault.Total   `json:"totals"`
		}{results, totals})
	} else if len(cases) > 1 {
		printTotals(totals)
	}
	right := func(r *fault.Result) bool { return r.State == fault.Right || r.State == fault.NotRun }
	if i := slices.IndexFunc(results, func(r *fault.Result) bool { return !right(r) }); i >= 0 && err == nil {
		return &failure{exitFindings, errors.New("")}
	}
	return err
}

// listFaults lists them.
func listFaults(s *settings) error {
	if s.json() {
		type row struct {
			Name   string   `json:"name"`
			Says   string   `json:"says"`
			Causes []string `json:"causes"`
		}
		rows := []row{}
		for _, f := range fault.All() {
			rows = append(rows, row{f.Name, f.Says, append([]string{}, f.Causes...)})
		}
		return printJSON(rows)
	}
	t := newTable(os.Stdout, "NUMBER", "NAME", "WHAT IT IS", "CAUSE TO BE NAMED")
	for _, f := range fault.All() {
		t.row(orDash(f.Number), f.Name, f.Says, orDash(strings.Join(f.Causes, " or ")))
	}
	t.print()
	return nil
}

// cases are the runs that arguments stand for.
func (w *faultWish) cases(args []string) (cases []fault.Case, err error) {
	for _, arg := range args {
		word, more, _ := strings.Cut(arg, ":")
		switch word {
		case "listed":
			cases = append(cases, fault.AsListed()...)
		case "variants":
			cases = append(cases, fault.Variants()...)
		case "controls":
			cases = append(cases, fault.Controls()...)
		case "random":
			drawn, err := w.random(more)
			if err != nil {
				return nil, err
			}
			cases = append(cases, drawn...)
		case "all":
			drawn, err := w.random(more)
			if err != nil {
				return nil, err
			}
			cases = slices.Concat(cases, fault.AsListed(), fault.Variants(), drawn, fault.Controls())
		default:
			name, six := strings.CutSuffix(arg, "/6")
			f, err := fault.Find(name)
			if err != nil {
				return nil, usage("%v", err)
			}
			cases = append(cases, fault.Of(f, six, rand.Uint64()))
		}
	}
	return cases, nil
}

// random draws runs, from SEED or SEED:N if that was said.
func (w *faultWish) random(said string) ([]fault.Case, error) {
	seed := uint64(rand.Uint32())
	first, nth, alone := strings.Cut(said, ":")
	if said != "" {
		var err error
		if seed, err = strconv.ParseUint(first, 10, 32); err != nil {
			return nil, usage("random:%s: use random:SEED or random:SEED:N", said)
		}
	}
	if !alone {
		fmt.Fprintf(os.Stderr, "random:%d\n", seed)
		return fault.Random(seed, w.rounds), nil
	}
	n, err := strconv.Atoi(nth)
	if err != nil || n < 1 {
		return nil, usage("random:%s: use random:SEED or random:SEED:N", said)
	}
	return fault.Random(seed, n)[n-1:], nil
}

// faultTracer runs `millrace trace` as anybody would.
type faultTracer struct {
	self, folder string
}

// trace is a fault.Tracer.
func (t *faultTracer) trace(ctx context.Context, run string, namespaces []string, window time.Duration, started func()) (*fault.Said, error) {
	file := filepath.Join(t.folder, strings.NewReplacer("/", "-", " + ", "+", " ", "-").Replace(run)+"-"+namespaces[0]+".json")
	cmd := exec.CommandContext(ctx, t.self, "trace", "--netns", strings.Join(namespaces, ","), "--for", window.String(), "-o", "json")
	cmd.Env = append(os.Environ(), evidenceVariable+"="+file)
	var out bytes.Buffer
	cmd.Stdout = &out
	errs, err := cmd.StderrPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	var said []string
	for lines := bufio.NewScanner(errs); lines.Scan(); {
		if strings.HasPrefix(lines.Text(), watchingWord) {
			started()
		} else {
			said = append(said, lines.Text())
		}
	}
	var exit *exec.ExitError
	if err := cmd.Wait(); err != nil && (!errors.As(err, &exit) || exit.ExitCode() != exitFindings) {
		return nil, fmt.Errorf("%w: %s", err, strings.Join(said, "; "))
	}
	return readTrace(out.Bytes(), file)
}

// readTrace is what the trace said, and what others would have said of the evidence.
func readTrace(out []byte, file string) (*fault.Said, error) {
	report := &traceReport{}
	if err := json.Unmarshal(out, report); err != nil {
		return nil, fmt.Errorf("read its report: %w", err)
	}
	text, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	var evidence cause.Evidence
	if err := json.Unmarshal(text, &evidence); err != nil {
		return nil, fmt.Errorf("read evidence: %w", err)
	}
	said := &fault.Said{Others: map[string][]string{reasonOnly: cause.ByReason(&evidence), countersOnly: cause.ByCounters(&evidence)}, Report: report}
	for _, v := range report.Verdicts {
		said.Named = append(said.Named, fault.Named{Cause: v.Cause, Namespace: v.Where.Namespace, Confidence: string(v.Confidence)})
	}
	return said, nil
}

// Who is compared with.
const (
	reasonOnly   = "reason only"
	countersOnly = "counters only"
)

// printRun prints a run: a line and what was wrong with it, or, of one alone, all that
// the trace says.
func printRun(r *fault.Result, alone bool) {
	state := red(string(r.State))
	if r.State == fault.Right {
		state = green(string(r.State))
	}
	if alone {
		for _, says := range r.Says {
			fmt.Printf("%s  %s\n", bold(r.Name), says)
		}
		fmt.Printf("the application saw: %s\n\n", r.Outcomes)
		if report, ok := r.Report.(*traceReport); ok {
			report.print(os.Stdout)
			fmt.Println()
		}
	}
	fmt.Printf("%-5s  %-10s  %-40s  named %s; expected %s; %s; %s\n", state, r.Kind, r.Name,
		orDash(namedText(r.Named)), orDash(strings.Join(r.Expected, " and ")), otherText(r, reasonOnly), otherText(r, countersOnly))
	for _, f := range r.False {
		fmt.Printf("       %s %s at %s, which is not there\n", red("false alarm:"), f.Cause, f.Namespace)
	}
	for _, m := range r.Missed {
		fmt.Printf("       %s %s\n", red("missed:"), m)
	}
	if r.Error != "" {
		fmt.Printf("       %s\n", r.Error)
	}
}

func namedText(named []fault.Named) string {
	var texts []string
	for _, n := range named {
		texts = append(texts, fmt.Sprintf("%s at %s (%s)", n.Cause, n.Namespace, n.Confidence))
	}
	return strings.Join(texts, ", ")
}

// otherText is what one who is compared with says: "reason only: no (firewall-drop)".
func otherText(r *fault.Result, who string) string {
	found := "no"
	if r.Found[who] {
		found = "yes"
	}
	return fmt.Sprintf("%s: %s (%s)", who, found, orDash(strings.Join(r.Others[who], " ")))
}

func printTotals(totals []fault.Total) {
	fmt.Println()
	t := newTable(os.Stdout, "TOTAL", "RUNS", "RIGHT", "FALSE ALARMS", "NOT JUDGED", strings.ToUpper(reasonOnly), strings.ToUpper(countersOnly))
	for _, total := range totals {
		share := "-"
		if total.Runs > 0 {
			share = fmt.Sprintf("%d (%.0f %%)", total.Right, 100*float64(total.Right)/float64(total.Runs))
		}
		t.row(string(total.Kind), fmt.Sprint(total.Runs), share, fmt.Sprint(total.False), fmt.Sprint(total.NotJudged),
			fmt.Sprint(total.Others[reasonOnly]), fmt.Sprint(total.Others[countersOnly]))
	}
	t.print()
}
