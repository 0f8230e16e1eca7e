package kube

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
)

const (
	// ErrandNamespace is where errands are made: it admits what runs a cluster.
	ErrandNamespace = "kube-system"
	// ErrandLabel is what their pods have.
	ErrandLabel = "app.kubernetes.io/name=millrace-doctor"
	// errandPause is the time between two looks at a pod.
	errandPause = time.Second
	// errandCleaning is how long one server may take to delete a pod, also after the end of
	// what the pod was for.
	errandCleaning = 10 * time.Second
)

// errandCapabilities are what looking into a node's namespaces takes, of capabilities(7).
var errandCapabilities = []corev1.Capability{"NET_ADMIN", "SYS_ADMIN", "SYS_PTRACE"}

// hopeless are reasons of a container that waits which no waiting mends.
var hopeless = []string{"ErrImagePull", "ImagePullBackOff", "ErrImageNeverPull", "InvalidImageName", "CreateContainerConfigError", "CreateContainerError", "RunContainerError"}

// Errand is a pod that runs millrace once on a node, where no agent does, and is deleted.
type Errand struct {
	Node, Image string
	Args        []string
	// Patience is how long it may take, its image included. Then it ends by itself, also if
	// nobody is there any more who deletes it. Whole seconds count.
	Patience time.Duration

	name string
}

// NewErrand names a pod that is not there yet.
func NewErrand(node, image string, args []string, patience time.Duration) *Errand {
	random := make([]byte, 5)
	rand.Read(random) // never fails
	return &Errand{node, image, args, patience, "millrace-doctor-" + hex.EncodeToString(random)}
}

// Name is the pod's, with its namespace.
func (e *Errand) Name() string { return ErrandNamespace + "/" + e.name }

// Manifest is the pod, as JSON. It has no service account, writes nowhere, and sees the
// node's network, processes and cgroups; the level of Pod Security that admits it is
// "privileged" (https://kubernetes.io/docs/concepts/security/pod-security-standards/).
func (e *Errand) Manifest() []byte {
	yes, no, root, deadline, soon := true, false, int64(0), int64(e.Patience.Seconds()), int64(1)
	kind := corev1.HostPathDirectory
	pod := &corev1.Pod{
		TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "Pod"},
		ObjectMeta: metav1.ObjectMeta{
			Name: e.name, Namespace: ErrandNamespace, Labels: map[string]string{"app.kubernetes.io/name": "millrace-doctor"},
		},
		Spec: corev1.PodSpec{
			NodeName: e.Node, RestartPolicy: corev1.RestartPolicyNever, ActiveDeadlineSeconds: &deadline, TerminationGracePeriodSeconds: &soon,
			HostNetwork: true, HostPID: true, DNSPolicy: corev1.DNSDefault,
			AutomountServiceAccountToken: &no, EnableServiceLinks: &no,
			Tolerations: []corev1.Toleration{{Operator: corev1.TolerationOpExists}},
			SecurityContext: &corev1.PodSecurityContext{
				SELinuxOptions:  &corev1.SELinuxOptions{Type: "spc_t"},
				AppArmorProfile: &corev1.AppArmorProfile{Type: corev1.AppArmorProfileTypeUnconfined},
				SeccompProfile:  &corev1.SeccompProfile{Type: corev1.SeccompProfileTypeRuntimeDefault},
			},
			Containers: []corev1.Container{{
				Name: "doctor", Image: e.Image, ImagePullPolicy: corev1.PullIfNotPresent, Args: e.Args,
				SecurityContext: &corev1.SecurityContext{
					Privileged: &no, AllowPrivilegeEscalation: &no, ReadOnlyRootFilesystem: &yes, RunAsUser: &root,
					Capabilities: &corev1.Capabilities{Drop: []corev1.Capability{"ALL"}, Add: errandCapabilities},
				},
				VolumeMounts: []corev1.VolumeMount{{Name: "cgroup", MountPath: "/sys/fs/cgroup", ReadOnly: true}},
			}},
			Volumes: []corev1.Volume{{Name: "cgroup", VolumeSource: corev1.VolumeSource{
				HostPath: &corev1.HostPathVolumeSource{Path: "/sys/fs/cgroup", Type: &kind},
			}}},
		},
	}
	text, err := json.Marshal(pod)
	if err != nil {
		panic(err) // plain values
	}
	return text
}

// Run makes the pod, waits until it has ended, and deletes it, whatever happens: it
// returns what the program wrote, to either output, and its exit status. It needs the
// verbs create, get and delete for pods and get for pods/log in ErrandNamespace.
func (e *Errand) Run(ctx context.Context, settings Settings) (out []byte, status int, err error) {
	ctx, cancel := context.WithTimeoutCause(ctx, e.Patience, fmt.Errorf("it has not ended in %s", e.Patience))
	defer cancel()
	unsure := false // a server may have made it, and has not said so
	err = askEach(settings, "make pod "+e.Name()+" on node "+e.Node, func(at *server) (decided bool, err error) {
		ctx, cancel := context.WithTimeout(ctx, agentsPatience) // others may have to admit it
		defer cancel()
		err = at.client.Post().AbsPath("/api/v1/namespaces", ErrandNamespace, "pods").MaxRetries(0).
			SetHeader("Content-Type", runtime.ContentTypeJSON).Body(e.Manifest()).Do(ctx).Error()
		if unsure && apierrors.IsAlreadyExists(err) {
			return true, nil // another server made it: nobody else knows its name
		}
		unsure = unsure || !answered(err)
		return answered(err), err
	})
	if apierrors.IsForbidden(err) {
		err = fmt.Errorf("%w: it takes the verb create for pods in %s, and that this namespace admits pods of the level privileged (label pod-security.kubernetes.io/enforce, or the policies of who else decides)", err, ErrandNamespace)
	}
	if refused := apierrors.APIStatus(nil); !unsure && errors.As(err, &refused) && refused.Status().Code/100 == 4 {
		return nil, 0, err // it was not made
	}
	defer func() { err = errors.Join(err, e.remove(context.WithoutCancel(ctx), settings)) }()
	if err != nil {
		return nil, 0, err
	}
	if status, err = e.wait(ctx, settings); err != nil {
		return nil, 0, err
	}
	err = askEach(settings, "read what pod "+e.Name()+" wrote", func(at *server) (decided bool, err error) {
		text, err := at.client.Get().AbsPath("/api/v1/namespaces", ErrandNamespace, "pods", e.name, "log").MaxRetries(0).
			SetHeader("Accept", "application/json, */*").Stream(ctx)
		if err != nil {
			return answered(err), err
		}
		defer text.Close()
		out, err = io.ReadAll(io.LimitReader(text, mostLogged))
		return false, err
	})
	return out, status, err
}

// mostLogged bounds what is read of what a pod wrote.
const mostLogged = 32 << 20

// wait returns the exit status of the pod's program.
func (e *Errand) wait(ctx context.Context, settings Settings) (status int, err error) {
	seen := "it is not there yet"
	for {
		select {
		case <-ctx.Done():
			return 0, fmt.Errorf("wait for pod %s on node %s: %w; %s", e.Name(), e.Node, context.Cause(ctx), seen)
		case <-time.After(errandPause):
		}
		p, err := e.get(ctx, settings)
		switch {
		case apierrors.IsNotFound(err) || apierrors.IsForbidden(err):
			return 0, err
		case err != nil:
			seen = err.Error()
			continue // another time it may answer
		}
		status, ended, why := look(p)
		switch {
		case ended && why == "":
			return status, nil
		case ended:
			return 0, fmt.Errorf("run pod %s on node %s: %s", e.Name(), e.Node, why)
		}
		seen = why
	}
}

func (e *Errand) get(ctx context.Context, settings Settings) (p *corev1.Pod, err error) {
	err = askEach(settings, "get pod "+e.Name(), func(at *server) (decided bool, err error) {
		ctx, cancel := context.WithTimeout(ctx, answerPatience)
		defer cancel()
		found, err := at.client.Get().AbsPath("/api/v1/namespaces", ErrandNamespace, "pods", e.name).MaxRetries(0).Do(ctx).Get()
		if err != nil {
			return answered(err), err
		}
		var ok bool
		if p, ok = found.(*corev1.Pod); !ok {
			return false, fmt.Errorf("the answer is a %T", found)
		}
		return true, nil
	})
	return p, err
}

// look says whether a pod has come to an end, and why to none that is good; of one that
// has not, how far it is.
func look(p *corev1.Pod) (status int, ended bool, why string) {
	how := "its phase is " + string(p.Status.Phase)
	for _, c := range p.Status.ContainerStatuses {
		switch s := c.State; {
		case s.Terminated != nil && p.Status.Reason == "":
			return int(s.Terminated.ExitCode), true, ""
		case s.Waiting != nil && slices.Contains(hopeless, s.Waiting.Reason):
			return 0, true, fmt.Sprintf("%s: %s", s.Waiting.Reason, s.Waiting.Message)
		case s.Waiting != nil:
			how += ", " + s.Waiting.Reason
		}
	}
	if p.Status.Phase == corev1.PodFailed || p.Status.Phase == corev1.PodSucceeded {
		return 0, true, fmt.Sprintf("it ended as %s: %s %s", p.Status.Phase, p.Status.Reason, p.Status.Message)
	}
	return 0, false, how
}

// remove deletes the pod; that it is gone is success.
func (e *Errand) remove(ctx context.Context, settings Settings) error {
	err := askEach(settings, "delete pod "+e.Name(), func(at *server) (decided bool, err error) {
		ctx, cancel := context.WithTimeout(ctx, errandCleaning)
		defer cancel()
		err = at.client.Delete().AbsPath("/api/v1/namespaces", ErrandNamespace, "pods", e.name).MaxRetries(0).Do(ctx).Error()
		return answered(err), err
	})
	if err == nil || apierrors.IsNotFound(err) {
		return nil
	}
	return fmt.Errorf("%w: kubectl -n %s delete pods -l %s removes it; it ends by itself after %s", err, ErrandNamespace, ErrandLabel, e.Patience)
}
